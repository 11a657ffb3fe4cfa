"""``import``, ``export`` and ``contrast``, and the other commands on what they make."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from operators import __main__ as cli
from operators.core.store import Store
from operators.model import loading as models
from operators.vectors.gguf_file import ControlVector, parse_control_vector, write_control_vector


@pytest.fixture
def store_path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def run(store_path, tiny_directory, monkeypatch, tmp_path):
    """``run("list", "--json")``: the command in this process, in a folder and with a store of its own."""
    monkeypatch.setenv("STEER_STORE", str(store_path))
    monkeypatch.setenv("STEER_MODEL", str(tiny_directory("llama")))
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli.app, list(arguments), catch_exceptions=False)


@pytest.fixture
def gguf(tmp_path):
    """Four directions of width 40, for the blocks 0 to 3 of the tiny Llama."""
    numbers = np.random.default_rng(1)
    directions = {block: numbers.standard_normal(40).astype(np.float32) for block in range(4)}
    write_control_vector(tmp_path / "happy.gguf", ControlVector("llama", directions))
    return directions


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "happy.txt").write_text("golden bridge\na golden dress\n")
    (tmp_path / "sad.txt").write_text("a painting\n")
    return ("--positive", "happy.txt", "--negative", "sad.txt")


@pytest.fixture
def no_model(monkeypatch):
    def load(*_args, **_kwargs):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(models, "load_model", load)


def _error(result, code=1):
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)["error"]


def test_a_layer_of_a_control_vector_is_imported_shown_and_listed(run, gguf, store_path):
    answer = json.loads(
        run("import", "happy", "happy.gguf", "--layer", "2", "--about", "happy, not sad", "--json").stdout
    )
    (made,) = answer["operators"]
    assert (made["name"], made["layer"], made["vector"]["tensor"]) == ("happy", 2, "direction.1")
    assert answer["left_out"] == []
    assert np.array_equal(Store(store_path).load("happy").anchor.numpy(), gguf[1])
    shown = run("show", "happy").stdout
    norm = float(np.linalg.norm(gguf[1].astype(np.float64)))
    for part in (
        "about:         'happy, not sad'",
        "rank:          0: a vector",
        "tensor 'direction.1' of a gguf file, for 'llama', sha256:",
        f"norm:          {norm:.6g}; coefficient c of programs that add c times the vector",
        f" is strength {2 * norm:.4g} c / |h|",
        "strength 0.3, cumulative, blend 1 (the default of docs/MEASURED.md, not measured for this concept: ",
    ):
        assert part in shown
    assert "reconstruction" not in shown
    assert "  vector  " in run("list").stdout
    assert json.loads(run("show", "happy", "--json").stdout)["vector"]["method"] == "import"
    refused = run("show", "happy", "--reads")
    assert refused.exit_code == 1
    assert "is a vector, which reads nothing" in refused.stderr


def test_all_layers_become_an_operator_each_and_the_one_without_a_block_is_named(run, gguf, store_path):
    command = ("import", "happy", "happy.gguf", "--all-layers", "--about", "happy")
    answer = json.loads(run(*command, "--json").stdout)
    assert [one["name"] for one in answer["operators"]] == ["happy-layer1", "happy-layer2", "happy-layer3"]
    assert answer["left_out"] == ["direction.3"]
    assert list(Store(store_path)) == ["happy-layer1", "happy-layer2", "happy-layer3"]
    assert "'happy-layer1' is already in" in _error(run(*command, "--json"))["message"]
    assert "left out: direction.3, added to the last block's output" in run(*command, "--replace").stdout


def test_what_was_imported_is_exported_with_every_bit(run, gguf, tmp_path):
    run("import", "happy", "happy.gguf", "--layer", "3", "--layer", "1", "--about", "happy")
    done = run("export", "happy-layer1", "happy-layer3", "--gguf", "out.gguf")
    assert done.exit_code == 0, done.output
    assert "happy-layer1: direction.0, norm" in done.stdout
    assert "direction.0: repeng reads it, llama.cpp has no place for it" in done.stdout
    found = parse_control_vector((tmp_path / "out.gguf").read_bytes(), source="out")
    assert found.model_hint == "llama"
    assert {block: vector.tolist() for block, vector in found.directions.items()} == {
        block: gguf[block].tolist() for block in (0, 2)
    }
    assert "is there already" in _error(run("export", "happy-layer1", "--gguf", "out.gguf", "--json"))["message"]
    assert "no operator 'gone'" in _error(run("export", "gone", "--gguf", "new.gguf", "--json"))["message"]


def test_what_is_wrong_with_an_import_is_said_before_a_model_is_loaded(run, gguf, no_model):
    needed = "the layer is needed (--layer, or --all-layers): happy.gguf has layer 1: 'direction.0'"
    for code, arguments, problem in (
        (1, ("a", "happy.gguf"), needed),
        (1, ("a", "happy.gguf", "--layer", "9"), "there is no vector for layer 9"),
        (1, ("a", "gone.gguf", "--layer", "1"), "gone.gguf: cannot be opened"),
        (2, ("A", "happy.gguf", "--layer", "1"), "operator name 'A' is not allowed"),
    ):
        assert problem in _error(run("import", *arguments, "--about", "x", "--json"), code)["message"]
    blank = run("import", "a", "happy.gguf", "--layer", "1", "--about", " ", "--json")
    assert "about has 0 characters" in _error(blank, 2)["message"]
    assert run("import", "a", "happy.gguf", "--layer", "1").exit_code == 2
    endless = run("import", "a", "happy.gguf", "--layer", "1", "--about", "x", "--strength", "inf", "--json")
    assert endless.exit_code == 2


def test_a_file_of_another_kind_of_model_is_taken_only_when_told(run, tmp_path, gguf):
    write_control_vector(tmp_path / "other.gguf", ControlVector("mistral", gguf))
    command = ("import", "other", "other.gguf", "--layer", "2", "--about", "x", "--json")
    assert "of kind 'mistral'" in _error(run(*command))["message"]
    assert run(*command, "--any-model-hint").exit_code == 0


def test_a_contrast_is_made_shown_and_computed_anew(run, texts, store_path):
    command = ("contrast", "happy", *texts, "--layer", "2", "--strength", "0.3")
    done = run(*command)
    assert done.exit_code == 0, done.output
    assert "mean of 2 texts ('happy.txt', " in done.stdout
    assert "strength 0.3, cumulative, blend 1" in done.stdout
    assert Store(store_path).read_header("happy").header.vector.method == "contrast"
    answer = json.loads(run("verify", "happy", *texts, "--json").stdout)
    assert answer["vector_error"] < 1e-6
    assert "computed anew from its texts it is off by" in run("verify", "happy", *texts).stdout
    assert "a vector's numbers are not computed anew" in run("verify", "happy").stdout
    assert run("verify", "happy", "--file-only").exit_code == 0
    swapped = run("verify", "happy", "--positive", "sad.txt", "--negative", "happy.txt", "--json")
    assert "positive file sad.txt has sha256:" in _error(swapped)["message"]
    assert "go together" in _error(run("verify", "happy", "--positive", "happy.txt", "--json"), 2)["message"]


def test_texts_of_an_imported_vector_or_a_map_cannot_be_compared(run, gguf, texts):
    run("import", "vector", "happy.gguf", "--layer", "2", "--about", "x")
    assert run("build", "map", "--text", "golden", "--layer", "2", "--rank", "2").exit_code == 0
    for name in ("vector", "map"):
        assert "is no contrast" in _error(run("verify", name, *texts, "--json"))["message"]


def test_what_is_wrong_with_texts_is_said_before_a_model_is_loaded(run, texts, no_model, tmp_path):
    for content, problem in (("", "there are no texts"), ("a\n\nb\n", "line 2 is blank"), ("a painting\n", "is in")):
        (tmp_path / "happy.txt").write_text(content)
        assert problem in _error(run("contrast", "happy", *texts, "--layer", "2", "--json"))["message"]


def test_vectors_are_combined_and_calibrated_by_the_commands(run, gguf, texts, store_path, tmp_path):
    run("import", "a", "happy.gguf", "--layer", "2", "--about", "a")
    run("contrast", "b", *texts, "--layer", "2")
    done = run("combine", "c", "a=1", "b=-0.5")
    assert done.exit_code == 0, done.output
    assert "mixture of +1 a, -0.5 b" in done.stdout
    (tmp_path / "prompts.txt").write_text("The bay\n")
    done = run("calibrate", "c", "--words", "e", "--prompts", "prompts.txt", "--tokens", "2")
    assert done.exit_code == 0, done.output
    points = Store(store_path).load("c").header.calibration.points
    assert {(point.layer, point.blend) for point in points} == {(2, 1.0)}
    moved = run("calibrate", "c", "--words", "e", "--layers", "1", "--json")
    assert "the operator is a vector of layer 2" in _error(moved)["message"]


def test_a_strength_that_no_server_takes_is_told_of_vectors_too(run, gguf, texts):
    for command in (
        ("import", "far", "happy.gguf", "--layer", "2", "--about", "x"),
        ("contrast", "near", *texts, "--layer", "2"),
    ):
        for strength, said in (
            ("5", "strength 5 pushes"),
            ("0", "strength 0 leaves"),
            ("0.001", "strength 0.001 is less"),
        ):
            done = run(*command, "--strength", strength, "--replace", "--json")
            (warning,) = json.loads(done.stdout)["warnings"]
            assert warning.startswith(said)
            assert done.stderr == f"steer-operators: warning: {warning}\n"
        assert json.loads(run(*command, "--replace", "--json").stdout)["warnings"] == []
