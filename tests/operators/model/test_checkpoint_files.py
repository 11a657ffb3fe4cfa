"""Files that change while a model is loaded, and after; and the digests that are kept for those that do not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from operators.core.errors import ModelError
from operators.model import digest_cache, loading, stored_weights
from operators.model.checkpoint_files import CheckpointFiles, stored_dtypes
from operators.model.digest_cache import cached_digest, keep_digest
from operators.model.loading import load_model
from tests.odd_models import odd_model
from tests.tiny_tokenizer import make_tokenizer

DIGEST = "1" * 64


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, in which files count as settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest_cache, "_SETTLED_NS", 0)
    return tmp_path / "cache/steering-operators/fingerprints"


@pytest.fixture
def directory(tiny_directory, tmp_path):
    return shutil.copytree(tiny_directory("llama"), tmp_path / "model")


@pytest.fixture
def reads(monkeypatch):
    """Counts how often weights are read for a digest."""
    counted, read = [], stored_weights.weights_digest
    monkeypatch.setattr(stored_weights, "weights_digest", lambda model: counted.append(model) or read(model))
    return counted


def _flip(directory, back=100):
    """One bit of the last numbers, in place, with the time of modification set back."""
    path = directory / "model.safetensors"
    found = path.stat()
    with path.open("r+b") as file:
        file.seek(found.st_size - back)
        [byte] = file.read(1)
        file.seek(found.st_size - back)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_of_json_files_those_are_parsed_that_name_others(directory, monkeypatch):
    parsed, loads = [], json.loads
    (directory / "part.index.json").write_text('{"weight_map": {"a": "below/a.safetensors"}}')
    (directory / "below").mkdir()
    (directory / "below/a.safetensors").touch()
    monkeypatch.setattr("operators.model.checkpoint_files.json.loads", lambda data: parsed.append(1) or loads(data))
    assert "a.safetensors" in {Path(stamp.path).name for stamp in CheckpointFiles.of(directory).stamps}
    assert len(list(directory.glob("*.json"))) > len(parsed) == 1


def test_a_second_start_reads_no_weights(directory, reads, cache):
    first = load_model(str(directory))
    assert (len(reads), len(list(cache.iterdir()))) == (1, 1)
    for dtype in ("float32", "bfloat16", "float64"):
        assert load_model(str(directory), dtype=dtype).fingerprint == first.fingerprint
    assert len(reads) == 1


def test_a_file_of_the_same_size_and_time_is_read_again(directory, reads):
    first = load_model(str(directory))
    _flip(directory)
    assert load_model(str(directory)).fingerprint != first.fingerprint
    assert len(reads) == 2


def test_a_file_that_takes_the_place_of_another_is_read_again(directory, reads, tmp_path):
    first = load_model(str(directory))
    path = directory / "model.safetensors"
    shutil.copy2(path, tmp_path / "other")
    _flip(directory)
    found = load_model(str(directory)).fingerprint
    os.replace(tmp_path / "other", path)
    assert load_model(str(directory)).fingerprint == first.fingerprint != found
    assert len(reads) == 3


def test_an_added_file_of_weights_is_seen(directory):
    files = CheckpointFiles.of(directory)
    keep_digest(files, DIGEST)
    assert cached_digest(CheckpointFiles.of(directory)) == DIGEST
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert cached_digest(CheckpointFiles.of(directory)) is None


def test_files_below_that_an_index_names_are_seen(directory):
    (directory / "parts").mkdir()
    os.rename(directory / "model.safetensors", directory / "parts/a.safetensors")
    with safe_open(directory / "parts/a.safetensors", framework="pt") as opened:
        index = {"metadata": {}, "weight_map": dict.fromkeys(opened.keys(), "parts/a.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    files = CheckpointFiles.of(directory)
    assert [path.name for path in files.weights] == ["a.safetensors"]
    first = load_model(str(directory)).fingerprint
    os.utime(directory / "parts/a.safetensors")
    with pytest.raises(ModelError, match=r"parts/a\.safetensors was changed"):
        files.check_unchanged("x")
    assert load_model(str(directory)).fingerprint == first


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-5],
        lambda data: b"[]",
        lambda data: b"\xff" * 9,
        lambda data: b"[" * 100_000,
        lambda data: data.replace(b'"weights": "', b'"weights": "0')[:-1],
        lambda data: json.dumps({**json.loads(data), "weights": "0" * 64}).encode(),
        lambda data: json.dumps({**json.loads(data), "key": "0" * 64}).encode(),
        lambda data: json.dumps({**json.loads(data), "weights": None}).encode(),
    ],
)
def test_a_damaged_entry_is_as_good_as_none(directory, cache, damage):
    files = CheckpointFiles.of(directory)
    keep_digest(files, DIGEST)
    [entry] = cache.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert cached_digest(files) is None
    keep_digest(files, DIGEST)
    assert cached_digest(files) == DIGEST


def test_a_cache_that_cannot_be_written_does_no_harm(directory, tmp_path, monkeypatch, tiny):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_model(str(directory)).fingerprint == tiny("llama").fingerprint


def test_a_file_that_was_changed_a_moment_ago_is_not_taken_as_settled(directory, monkeypatch, cache):
    monkeypatch.setattr(digest_cache, "_SETTLED_NS", 3600 * 10**9)
    load_model(str(directory))
    assert not cache.exists()


def test_an_entry_is_one_whole_file(directory, cache):
    keep_digest(CheckpointFiles.of(directory), DIGEST)
    [entry] = cache.iterdir()
    assert entry.suffix == ".json"
    with pytest.raises(ValueError, match="is no sha256"):
        keep_digest(CheckpointFiles.of(directory), "0")


@pytest.mark.parametrize("change", ["written", "replaced", "removed", "added"])
def test_files_that_change_while_a_model_is_loaded_are_noticed(directory, cache, monkeypatch, change):
    read, path = loading._from_files, directory / "model.safetensors"

    def read_first(*arguments):
        found = read(*arguments)
        if change == "written":
            _flip(directory)
        elif change == "replaced":
            shutil.copy2(path, directory / "other")
            os.replace(directory / "other", path)
        elif change == "removed":
            path.unlink()
        else:
            (directory / "extra.safetensors").write_bytes(path.read_bytes())
        return found

    monkeypatch.setattr(loading, "_from_files", read_first)
    name = "extra" if change == "added" else "model"
    with pytest.raises(ModelError, match=rf"{name}\.safetensors was changed after the model began to load") as refusal:
        load_model(str(directory))
    assert "\n" not in str(refusal.value)
    assert not cache.exists()


def test_a_loaded_model_does_not_follow_its_files(directory, tiny):
    loaded = load_model(str(directory))
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
    expected = tiny("llama", "sdpa", "float32").model.state_dict()
    # A file that is mapped would also end this process, by a signal, where it is cut.
    assert str(directory) not in Path("/proc/self/maps").read_text()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())


def test_the_dtypes_of_damaged_files_are_none(tmp_path):
    for name, content in (("a.safetensors", b"x"), ("b.bin", b"version https://git-lfs"), ("c.bin", b"")):
        (tmp_path / name).write_bytes(content)
    torch.save({"w": torch.ones(2, dtype=torch.float16), "n": torch.ones(2, dtype=torch.int64)}, tmp_path / "d.bin")
    torch.save([1, 2], tmp_path / "e.bin")
    assert stored_dtypes([*tmp_path.iterdir(), tmp_path / "none.bin"]) == {torch.float16}


def test_a_directory_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"none cannot be read: No such file"):
        CheckpointFiles.of(tmp_path / "none")


@pytest.mark.parametrize("stream", [False, True])
def test_a_shard_that_is_missing_or_cut_is_named_before_anything_is_loaded(stream, tmp_path, monkeypatch):
    odd_model("llama").float().save_pretrained(tmp_path, max_shard_size="40KB")
    make_tokenizer().save_pretrained(tmp_path)
    assert load_model(str(tmp_path), stream=stream).num_layers == 4
    monkeypatch.setattr("operators.model.loading._from_files", lambda *_: pytest.fail("it was loaded"))
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(
        ModelError, match=rf"^model '{tmp_path}' cannot be loaded: {shard.name} is no whole safetensors file"
    ):
        load_model(str(tmp_path), stream=stream)
    shard.unlink()
    with pytest.raises(
        ModelError, match=rf"^model '{tmp_path}' cannot be loaded: .* lacks {shard.name}, which its index names"
    ):
        load_model(str(tmp_path), stream=stream)
    for file in tmp_path.glob("model*"):
        file.unlink()
    with pytest.raises(ModelError, match=rf"^model '{tmp_path}' cannot be loaded: .* has none of model\.safetensors, "):
        load_model(str(tmp_path), stream=stream)
