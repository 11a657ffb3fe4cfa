"""``lens``, and the other commands on a lens."""

import json
import re

import pytest
from typer.testing import CliRunner

from operators import __main__ as cli
from operators.core.artifact import OperatorArtifact
from operators.core.claims import claim
from operators.core.errors import BuildError
from operators.core.store import Store
from operators.lens import matrices, search
from operators.lens.measure import Panel
from operators.lens.search import SearchPlan
from operators.model import loading as models
from operators.tune.calibrate import calibrate as calibrate_operator
from operators.tune.calibration_spec import CalibrationSpec

PLAN = SearchPlan(Panel(("the",), ("The", "A"), 2), Panel(("the",), ("The",), 3), scout_rounds=2, curve=(0.5, 1.0, 2.0))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def run(store, tiny_directory, monkeypatch, tmp_path, load_once):
    """``run("lens", "--json")``: the command in this process, with a small search."""
    monkeypatch.setenv("STEER_STORE", str(store.path))
    monkeypatch.setenv("STEER_MODEL", str(tiny_directory("llama")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_model", load_once)
    monkeypatch.setattr(SearchPlan, "default", classmethod(lambda _cls: PLAN))
    (tmp_path / "neutral.txt").write_text("The bridge is painted.\nHere is the bay.\n")
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli.app, list(arguments), catch_exceptions=False)


@pytest.fixture
def built(run):
    done = run("lens", "--texts", "neutral.txt", "--layer", "2", "--positions", "first", "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def _error(done, code=1):
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)["error"]["message"]


def test_a_lens_is_searched_for_built_and_stored(run, store):
    done = run("lens", "words", "--texts", "neutral.txt", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    lens = store.load("words")
    assert answer["digest"] == lens.digest
    source = lens.header.lens
    assert answer["found"] is (source.default_kl is not None)
    assert {finding.positions for finding in source.findings} == {"first", "others", "all"}
    assert source.texts == 2
    assert list(store.path.iterdir()) == [store.path_of("words")]
    assert all(part in run("show", "words").output for part in ("tried:", "  first ", "  others ", "  all "))


def test_show_and_list_say_what_it_is(run, built):
    assert "lens" in run("list").output
    text = run("show", "lens").output
    for part in ("first position of 2 neutral texts", "dose curve (1 prompts x 3 tokens, words the", "p95 KL"):
        assert part in text
    assert json.loads(run("show", "lens", "--json").stdout)["lens"]["positions"] == "first"


def test_verify_computes_it_anew(run, built):
    answer = json.loads(run("verify", "lens", "--texts", "neutral.txt", "--json").stdout)
    assert answer["lens_error"] < 1e-5
    assert "computed anew" in run("verify", "lens", "--texts", "neutral.txt").output
    assert "other neutral texts" in _error(run("verify", "lens", "--json"))
    assert run("verify", "lens", "--file-only").exit_code == 0


def test_where_nothing_steers_it_says_so_and_recommends_nothing(run, store, monkeypatch):
    # No text is useful beyond this share.
    monkeypatch.setattr(search, "STEERS", 2.0)
    done = run("lens", "--texts", "neutral.txt", "--layer", "2", "--positions", "first")
    assert done.exit_code == 0
    assert "nothing steers this model well enough" in done.output
    assert "requests must give one" in done.output
    header = store.load("lens").header
    assert (header.lens.default_kl, header.recommended.strength) == (None, 0.0)
    assert header.lens.curve is not None
    assert "a request must give one" in run("show", "lens").output


def test_a_dry_run_says_what_would_be_done(run, store):
    plan = json.loads(run("lens", "--texts", "neutral.txt", "--dry-run", "--json").stdout)
    assert (plan["texts"], plan["rows"], plan["candidates"]) == (2, 80, 3 * len(plan["layers"]))
    assert plan["seconds"] == pytest.approx(plan["seconds_of_matrices"] + plan["seconds_of_search"], abs=0.2)
    told = run("lens", "--texts", "neutral.txt", "--dry-run").output
    assert "at most" in told
    assert re.search(r"about \d+ s in all. Nothing was changed", told)
    assert not store.path.exists()


def test_the_time_that_is_told_grows_with_what_is_left_to_do(run, tmp_path, monkeypatch):
    # As long as every row and every token took a second.
    monkeypatch.setattr("operators.tune.pace.seconds_per_row_token", lambda *_: 1.0)
    clock = iter(range(10_000))
    monkeypatch.setattr("operators.commands._lens_plan.time.monotonic", lambda: next(clock))
    one, two = (
        json.loads(run("lens", "--texts", "neutral.txt", *more, "--dry-run", "--json").stdout)
        for more in (("--layer", "2", "--positions", "first"), ())
    )
    # Texts of three tokens, each with the reference row beside it.
    assert one["seconds_of_search"] == 2 * 3 * PLAN.most_texts(1)
    assert two["seconds_of_search"] > one["seconds_of_search"]


def test_a_second_search_of_the_same_name_is_refused(run, store):
    with claim(store, "lens", "a search for a lens"):
        message = _error(run("lens", "--texts", "neutral.txt", "--json"))
        assert f"operator 'lens' in {store.path} is in use: a search for a lens by process" in message
        assert run("lens", "--texts", "neutral.txt", "--dry-run").exit_code == 0


def test_ctrl_c_keeps_the_matrices_and_the_same_command_goes_on(run, store, monkeypatch):
    real, calls = matrices.text_pulls, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(matrices, "text_pulls", interrupted)
    command = ("lens", "--texts", "neutral.txt", "--layer", "2", "--positions", "first")
    done = run(*command)
    assert done.exit_code == 130
    assert "the matrices of 1 of 2 texts are kept" in done.output
    assert store.names() == []
    assert "1 texts of which are kept" in run(*command, "--dry-run").output
    assert run(*command).exit_code == 0
    assert len(calls) == 3
    assert list(store.path.iterdir()) == [store.path_of("lens")]


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (1, ("--layer", "0"), "layer 0 of"),
        (1, ("--layer", "4"), "1 to 3 are accepted for a lens"),
        (1, ("--texts", "missing.txt"), "missing.txt"),
        (1, ("--texts", "one.txt"), "2 or more are needed"),
        (2, ("Bad Name",), "is not allowed"),
    ],
)
def test_what_is_wrong_is_said(run, tmp_path, code, arguments, message):
    (tmp_path / "one.txt").write_text("a\n")
    assert message in _error(run("lens", *arguments, "--json"), code)


def test_a_name_that_is_taken_is_refused_before_the_model_is_loaded(run, built, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_args, **_options: pytest.fail("the model was loaded"))
    assert "already in" in _error(run("lens", "--json"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("calibrate", "lens", "--words", "tea"), "is a lens"),
        (("combine", "both", "lens=1", "other=1"), "is a lens"),
        (("export", "lens", "--gguf", "lens.gguf"), "is a lens"),
        (("show", "lens", "--reads"), "is a lens"),
    ],
)
def test_a_lens_where_an_operator_is_needed_is_refused(run, built, store, load_once, make_rank_0, command, message):
    loaded = load_once(built["model"])
    store.save("other", make_rank_0(loaded=loaded))
    assert message in _error(run(*command, "--json"))


def test_calibration_refuses_it_too(run, built, store, load_once):
    lens = store.load("lens")
    assert isinstance(lens, OperatorArtifact)
    with pytest.raises(BuildError, match="a lens is not calibrated"):
        calibrate_operator(lens, load_once(built["model"]), CalibrationSpec(words=("tea",), prompts=("The",)))
