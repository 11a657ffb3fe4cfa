"""What tests of ``build --file`` share, the store and the model, and those of ``obtain``: the cache."""

import functools

import pytest
from typer.testing import CliRunner

from operators.__main__ import app
from operators.model import loading as models


@pytest.fixture
def shelf(tmp_path):
    return tmp_path / "store"


@pytest.fixture(scope="session")
def load_once():
    """``load_model``, which reads each model once."""
    return functools.cache(models.load_model)


@pytest.fixture
def build_file(shelf, tiny_directory, load_once, monkeypatch, tmp_path):
    """``build_file(text, "--json")``: ``build --file`` of a file with that text."""
    monkeypatch.setattr(models, "load_model", load_once)
    monkeypatch.setenv("STEER_STORE", str(shelf))
    monkeypatch.setenv("STEER_MODEL", str(tiny_directory("llama")))
    monkeypatch.chdir(tmp_path)

    def invoke(text, *arguments):
        (tmp_path / "c.toml").write_text(text, encoding="utf-8")
        return CliRunner().invoke(app, ["build", "--file", "c.toml", *arguments], catch_exceptions=False)

    return invoke


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """The directory that is the cache of models: not made yet."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_args: tmp_path / "cache")
    return tmp_path / "cache"
