"""``renew`` signs what an earlier version signed, where its model gives the same numbers."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from operators import __main__ as cli
from operators.commands import calibrate, verify
from operators.core.artifact import make_artifact, tensors_of, with_header
from operators.core.header import Calibration
from operators.core.store import Store
from operators.model.earlier_fingerprint import earlier_fingerprint
from operators.model.loading import load_model

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "store"
    path.mkdir()
    for name in ("exact", "low-rank"):
        shutil.copy(DATA / f"{name}-0.1.0.safetensors", path / f"{name}.safetensors")
    return Store(path)


@pytest.fixture
def run(store, tiny_directory, monkeypatch, tmp_path):
    """``run("renew", NAME)``: the command in this process, in a folder and with a store of its own."""
    monkeypatch.setenv("STEER_STORE", str(store.path))
    monkeypatch.setenv("STEER_MODEL", str(tiny_directory("llama")))
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli.app, list(arguments), catch_exceptions=False)


def _error(result):
    assert result.exit_code == 1
    return json.loads(result.stdout)["error"]["message"]


def _age(store, name, loaded):
    """Signs an operator as an earlier version would have."""
    old = with_header(store.load(name), model_fingerprint=earlier_fingerprint(loaded.model))
    store.save(name, old, replace=True)
    return old


@pytest.mark.parametrize(("name", "family"), [("exact", "llama"), ("low-rank", "gpt2")])
def test_an_operator_of_an_earlier_version_is_computed_anew_and_signed(run, store, tiny_directory, name, family):
    model, old = str(tiny_directory(family)), store.load(name)
    assert "'steer-operators renew NAME'" in _error(run("verify", name, "--model", model, "--json"))
    answer = json.loads(run("renew", name, "--model", model, "--json").stdout)
    new = store.load(name)
    assert answer["renewed"]
    assert answer["reconstruction_error"] < 1e-5
    assert (answer["digest_before"], answer["digest"]) == (old.digest, new.digest)
    assert new.header.model_fingerprint == load_model(model).fingerprint
    assert new.header.model_copy(update={"model_fingerprint": old.header.model_fingerprint}) == old.header
    assert all(tensor.equal(tensors_of(old)[key]) for key, tensor in tensors_of(new).items())
    assert run("verify", name, "--model", model).exit_code == 0
    assert "nothing to renew" in run("renew", name, "--model", model).output
    assert store.load(name).digest == new.digest


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_an_operator_is_not_renewed_on_another_model(run, store, tiny_directory, family):
    before = store.path_of("exact").read_bytes()
    assert "cannot be renewed on this model" in _error(
        run("renew", "exact", "--model", str(tiny_directory(family)), "--json")
    )
    assert store.path_of("exact").read_bytes() == before


def test_an_operator_of_a_model_that_only_looks_the_same_is_to_be_built_again(run, store, tiny_directory, tmp_path):
    directory = shutil.copytree(tiny_directory("llama"), tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    for name in weights:
        # Column 11 of 40 is not in the sample.
        if "layers.0.self_attn.o_proj" in name:
            weights[name][:, 11] = 0.0
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    assert earlier_fingerprint(load_model(str(directory)).model) == store.load("exact").header.model_fingerprint
    before = store.path_of("exact").read_bytes()
    message = _error(run("renew", "exact", "--model", str(directory), "--json"))
    assert "'exact' is not renewed, and is to be built again" in message
    assert store.path_of("exact").read_bytes() == before


def test_an_operator_whose_numbers_are_others_is_not_renewed(run, store, tiny_directory):
    good = store.load("exact")
    parts = (1.01 * good.factors, good.anchor, good.substitute_base)
    store.save("exact", make_artifact(good.header, *parts, neutral=good.neutral), replace=True)
    message = _error(run("renew", "exact", "--model", str(tiny_directory("llama")), "--json"))
    assert "is to be built again" in message


def test_a_contrast_is_renewed_from_its_texts(run, store, tiny, tmp_path):
    (tmp_path / "happy.txt").write_text("golden bridge\na golden dress\n")
    (tmp_path / "sad.txt").write_text("a painting\n")
    texts = ("--positive", "happy.txt", "--negative", "sad.txt")
    assert run("contrast", "happy", *texts, "--layer", "2").exit_code == 0
    made = store.load("happy")
    _age(store, "happy", tiny("llama"))
    assert "--positive and --negative take its texts" in _error(run("renew", "happy", "--json"))
    assert run("renew", "happy", *texts).exit_code == 0
    assert store.load("happy").digest == made.digest


def test_a_vector_that_no_model_gives_is_to_be_imported_again(run, store, make_rank_0, tiny):
    store.save("vector", make_rank_0(loaded=tiny("llama")))
    old = _age(store, "vector", tiny("llama"))
    assert "import it again" in _error(run("renew", "vector", "--json"))
    assert store.load("vector").digest == old.digest


def test_a_lens_is_renewed_from_its_neutral_texts(run, store, tiny, tmp_path):
    (tmp_path / "neutral.txt").write_text("a painting of the bay\nthe wedding was beautiful\n")
    arguments = ("--texts", "neutral.txt", "--layer", "2", "--positions", "first", "--quick")
    assert run("lens", *arguments).exit_code == 0
    made = store.load("lens")
    _age(store, "lens", tiny("llama"))
    assert "other neutral texts" in _error(run("renew", "lens", "--json"))
    assert run("renew", "lens", "--texts", "neutral.txt").exit_code == 0
    assert store.load("lens").digest == made.digest


def test_what_was_replaced_or_deleted_meanwhile_is_not_put_back(run, store, tiny_directory, monkeypatch):
    other = with_header(store.load("low-rank"), concept="another")

    def load_slowly(change):
        def load(*arguments):
            change()
            return loading(*arguments)

        return load

    loading = verify._load
    arguments = ("renew", "exact", "--model", str(tiny_directory("llama")), "--json")
    monkeypatch.setattr(verify, "_load", load_slowly(lambda: store.save("exact", other, replace=True)))
    old = store.load("exact")
    assert f"it was made from {old.digest}, and {store.path} has {other.digest}" in _error(run(*arguments))
    assert store.load("exact").digest == other.digest
    store.save("exact", old, replace=True)
    monkeypatch.setattr(verify, "_load", load_slowly(lambda: store.delete("exact")))
    assert "no operator 'exact'" in _error(run(*arguments))
    assert store.names() == ["low-rank"]


def test_a_calibration_of_what_was_replaced_meanwhile_is_not_stored(run, store, tiny_directory, monkeypatch):
    other = with_header(store.load("low-rank"), concept="another")

    def calibrate_slowly(name, artifact, *_arguments, **_options):
        store.save(name, other, replace=True)
        calibration = Calibration(
            words=("a",), kl_budget=1.0, max_perplexity_ratio=2.0, min_distinct_ratio=0.5, prompts=2, tokens=3,
            plain_hit_rate=0.0, plain_perplexity=2.0, plain_distinct_2=0.5, points=(), chosen=None,
        )  # fmt: skip
        return SimpleNamespace(artifact=with_header(artifact, calibration=calibration)), None

    monkeypatch.setattr(calibrate, "calibrate_in_store", calibrate_slowly)
    found = run("calibrate", "exact", "--words", "a", "--model", str(tiny_directory("llama")), "--json")
    assert f"and {store.path} has {other.digest}" in _error(found)
    assert store.load("exact").digest == other.digest
