"""``steer-operators analyse`` as its users meet it."""

import base64
import json
import os
import re
import stat
import sys

import pytest
from typer.testing import CliRunner

from operators import __main__ as cli
from operators.analyse import canvas, plots, results
from operators.core import progress
from operators.model import loading as models

TEXT = "The Golden Gate"


@pytest.fixture
def run(tiny_directory, monkeypatch, tmp_path):
    """``run("--text", TEXT)``: the command in this process, in an empty directory, with the tiny Llama."""
    monkeypatch.setenv("STEER_MODEL", str(tiny_directory("llama")))
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli.app, ["analyse", *arguments], catch_exceptions=False)


@pytest.fixture
def no_model(monkeypatch):
    def load(*_args, **_kwargs):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(models, "load_model", load)


@pytest.fixture
def undrawn(monkeypatch):
    """Empty images: drawing takes most of the time."""
    names = ("reconstruction", "spectra", "positions", "emergence", "dimensions", "stream")
    monkeypatch.setattr(plots, "analysis_plots", lambda _found: dict.fromkeys(names, canvas.ThemedImage(b"", b"")))


def test_analyse_writes_report_data_and_plots_and_says_where(run, tmp_path, tiny_directory):
    result = run("--text", TEXT, "--out", "deep/out", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    out = tmp_path / "deep" / "out"
    assert {tmp_path / path for path in answer["files"].values()} == set(out.iterdir())
    assert {path.suffix for path in out.iterdir()} == {".html", ".json", ".png"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o644}
    for image in out.glob("*.png"):
        content = image.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert base64.b64encode(content).decode() in (out / "analysis.html").read_text()
    found = results.analysis_from_json((out / "analysis.json").read_text())
    assert (found.text, found.model, found.dtype) == (TEXT, str(tiny_directory("llama")), "float32")
    assert answer["detached_error"] == found.reconstruction.detached_error < 1e-5
    assert answer["next_token"] == found.answer[0].text
    assert "".join(position["token"] for position in answer["positions"]) == TEXT
    assert answer["emergence"]["stream"] == found.emergence.stream


def test_analyse_prints_the_headlines_as_lines(run, undrawn, tmp_path):
    result = run("--text", TEXT, "--layer", "2", "--dtype", "float64", "--device", "cpu")
    assert result.exit_code == 0
    lines = dict(re.split(r":\s+", line, maxsplit=1) for line in result.stdout.splitlines())
    assert float(lines["reconstruction"].split()[0]) < 1e-12
    assert lines["report"] == "analysis/analysis.html"
    assert (tmp_path / "analysis" / "analysis.html").is_file()


def test_compare_writes_table_plot_and_data(run, tmp_path, tiny_directory):
    (tmp_path / "some.txt").write_text("The Golden Gate\na painting\nx\n")
    two = [str(tiny_directory("llama")), str(tiny_directory("gpt2"))]
    result = run("--compare", *two, "--phrases", "some.txt", "--limit", "2", "--out", "out", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert answer["phrases"] == 2
    assert [model["model"] for model in answer["models"]] == two
    found = results.summaries_from_json((tmp_path / "out" / "comparison.json").read_text())
    assert found.phrases == ("The Golden Gate", "a painting")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "comparison.html",
        "comparison.json",
        "stable-ranks.png",
    }
    lines = run("--compare", two[0], "--phrases", "some.txt").stdout
    assert re.search(r"llama\S*: first [\d.]+ \[[\d.]+–[\d.]+\], last ", lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--text is needed"),
        (["--text", TEXT, "some-model"], "models go with --compare"),
        (["--text", TEXT, "--limit", "3"], "--limit goes with --compare"),
        (["--text", TEXT, "--phrases", "some.txt"], "--phrases goes with --compare"),
        (["--compare"], "--compare needs one or more models"),
        (["--compare", "a", "--text", TEXT], "--text goes without --compare"),
        (["--compare", "a", "--layer", "3"], "--layer goes without --compare"),
        (["--text", TEXT, "--dtype", "int8"], "int8"),
    ],
)
def test_a_wrong_command_line_exits_with_2(run, no_model, arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in re.sub(r"[│\s]+", " ", result.stderr)


def _refused(result):
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_what_needs_no_model_to_be_refused_is_refused_before_it_is_loaded(run, no_model, tmp_path):
    assert "has no tokens" in _refused(run("--text", ""))
    (tmp_path / "file").touch()
    assert "directory file cannot be written to: File exists" in _refused(run("--text", TEXT, "--out", "file"))
    assert "cannot be written to: Not a directory" in _refused(run("--text", TEXT, "--out", "file/below"))
    assert "phrases none.txt cannot be read" in _refused(run("--compare", "m", "--phrases", "none.txt"))
    assert "phrases file is empty" in _refused(run("--compare", "m", "--phrases", "file"))
    assert "limit is 0; 1 or more is accepted" in _refused(run("--compare", "m", "--limit", "0"))
    error = json.loads(run("--text", "", "--json").stdout)["error"]
    assert error["type"] == "ConceptError"


def test_a_missing_matplotlib_is_reported_before_the_model_is_loaded(run, no_model, monkeypatch):
    monkeypatch.setattr(canvas, "find_spec", lambda _name: None)
    for arguments in (["--text", TEXT], ["--compare", "m"]):
        assert "install steering-operators[analyse]" in _refused(run(*arguments))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_refused(run, no_model, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    assert "cannot be written to: Permission denied" in _refused(run("--text", TEXT, "--out", "shut"))


def test_a_layer_or_a_model_that_is_not_there_is_refused(run, tmp_path):
    assert "1 to 4 are accepted" in _refused(run("--text", TEXT, "--layer", "9"))
    assert "no/such-model" in _refused(run("--text", TEXT, "--model", "no/such-model"))
    assert list((tmp_path / "analysis").iterdir()) == []


def test_a_file_that_cannot_be_replaced_is_named(run, undrawn, tmp_path):
    (tmp_path / "analysis" / "analysis.json").mkdir(parents=True)
    assert "analysis/analysis.json cannot be written: Is a directory" in _refused(run("--text", TEXT))
    assert [path.name for path in (tmp_path / "analysis").iterdir()] == ["analysis.json"]


def test_progress_is_drawn_on_a_terminal_only(capfd, monkeypatch):
    with progress.progress_bars() as update:
        update("Layers", 1, 2)
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.progress_bars() as update:
        update("Layers", 1, 2)
        update("Phrases, [m]", 1, 3)
    drawn = capfd.readouterr().err
    assert "Layers" in drawn
    assert "Phrases, [m]" in drawn
