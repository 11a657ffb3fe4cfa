"""Which version of a Hugging Face id is loaded, and checkpoints of which there are two readings."""

import shutil
from fnmatch import fnmatch

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from operators.core.errors import ModelError
from operators.model.loading import load_model

_COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def hub_model(tiny_directory, tmp_path, monkeypatch):
    """The cache of a model of which there are two versions; the first is its newest one."""
    repository = tmp_path / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    for sign, commit in zip((1, -1), _COMMITS, strict=True):
        snapshot = shutil.copytree(tiny_directory("llama"), repository / "snapshots" / commit)
        tensors = load_file(snapshot / "model.safetensors")
        save_file(
            {name: sign * tensor for name, tensor in tensors.items()}, snapshot / "model.safetensors", {"format": "pt"}
        )
    (repository / "refs" / "main").write_text(_COMMITS[0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return repository


def test_one_version_of_a_hub_id_is_loaded_though_a_newer_one_comes_meanwhile(hub_model):
    def publish(_model):
        (hub_model / "refs" / "main").write_text(_COMMITS[1])

    first, second = (hub_model / "snapshots" / commit for commit in _COMMITS)
    loaded = load_model("somebody/tiny", check=publish)
    assert loaded.files.directory == first
    assert loaded.fingerprint == load_model(str(first)).fingerprint
    newer = load_model("somebody/tiny")
    assert newer.files.directory == second
    assert newer.fingerprint == load_model(str(second)).fingerprint != loaded.fingerprint


def test_the_weights_of_a_hub_id_are_fetched_to_be_streamed(hub_model, tmp_path, monkeypatch):
    snapshot = hub_model / "snapshots" / _COMMITS[0]
    whole = load_model("somebody/tiny")
    away = (snapshot / "model.safetensors").rename(tmp_path / "away")
    checked = []

    def fetch(source, *, revision, allow_patterns):
        assert (source, revision) == ("somebody/tiny", _COMMITS[0])
        assert checked, "nothing is fetched for what does not fit"
        assert any(fnmatch("model.safetensors", pattern) for pattern in allow_patterns)
        away.rename(snapshot / "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    streamed = load_model("somebody/tiny", stream=True, check_streamed=checked.append)
    assert streamed.fingerprint == whole.fingerprint


def test_a_tied_head_with_numbers_of_its_own_is_refused(tiny, tmp_path):
    loaded = tiny("gemma3", dtype="float32", fresh=True)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, file, {"format": "pt"})
    assert load_model(str(tmp_path)).name == str(tmp_path)
    head[5, 3] += 0.01
    save_file({**tensors, "lm_head.weight": head}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="ties the head to the embedding table"):
        load_model(str(tmp_path))
