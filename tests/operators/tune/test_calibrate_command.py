"""The command ``calibrate``: what it stores, keeps, tells and refuses."""

import json

import pytest
from typer.testing import CliRunner

from operators import __main__ as cli
from operators.core.artifact import with_header
from operators.core.header import Calibration, CalibrationPoint
from operators.core.store import Store
from operators.model import loading as models
from operators.tune.form import ALL_FORMS

TEXT = "The bay"


@pytest.fixture
def shelf(tmp_path, tiny_directory, monkeypatch):
    """A store with ``bay``, built on the tiny Llama at layer 2; ``shelf.run(...)`` runs the command on it."""
    monkeypatch.setenv("STEER_STORE", str(tmp_path))
    monkeypatch.setenv("STEER_MODEL", str(tiny_directory("llama")))
    (tmp_path / "two").write_text("The bay\nMy dress\n")
    tmp_path.joinpath("x").mkdir()

    def run(*arguments):
        return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)

    assert run("build", "bay", "--text", TEXT, "--layer", "2").exit_code == 0
    return tmp_path, lambda *more: run("calibrate", "bay", "--prompts", str(tmp_path / "two"), "--tokens", "3", *more)


def test_the_command_stores_curves_and_remembers_the_words(shelf, monkeypatch):
    directory, run = shelf
    result = run("--words", "neverwritten, nor this", "--layers", "1,2", "--quick")
    assert result.exit_code == 0
    assert "bay: no setting found" in result.stdout
    assert "The recommendation stays: layer 2, strength 0.3, cumulative, blend 1, contrast anchor" in result.stdout
    first = Store(directory).load("bay").header.calibration
    assert first.words == ("neverwritten", "nor this")
    result = run("--layers", "2", "--json")
    answer = json.loads(result.stdout)
    assert answer["found"] is False
    assert answer["calibration"]["words"] == ["neverwritten", "nor this"]
    assert answer["calibration"]["prompts"] == 2
    assert answer["digest"] == Store(directory).load("bay").digest


def test_the_command_recommends_what_it_found_and_draws_it(shelf):
    pytest.importorskip("matplotlib")
    directory, run = shelf
    alphabet = ",".join("abcdefghijklmnopqrstuvwxyz")
    result = run(
        "--words",
        alphabet,
        "--layers",
        "1",
        "--max-perplexity-ratio",
        "1e9",
        "--min-distinct-ratio",
        "0",
        "--plot",
        f"{directory}/c.png",
    )
    found = Store(directory).load("bay").header
    assert (directory / "c.png").read_bytes().startswith(b"\x89PNG")
    assert f"strength {found.recommended.strength:g}, {found.recommended.rule}" in result.stdout


def _point(useful_rate, strength=0.3):
    return CalibrationPoint(layer=2, rule="cumulative", blend=0.5, strength=strength, texts=2, kl_p95=0.9, kl_mean=0.2,
                            hit_rate=useful_rate, useful_rate=useful_rate, tokens=3, anchor="contrast",
                            perplexity_ratio=1.2, distinct_2=0.8)  # fmt: skip


@pytest.fixture
def search(monkeypatch):
    """What searches find, one after the other: useful rates, or None. ``search.incumbents`` is what they were given."""
    rates = []

    def search_settings(_operators, _layers, _loaded, spec, *, incumbent, **_):
        rates.incumbents.append(incumbent)
        found = rates.pop(0)
        points = [_point(found or 0.0, 0.4)] + ([incumbent] if incumbent else [])
        best = max(range(len(points)), key=lambda place: points[place].useful_rate)
        return Calibration(words=spec.words, kl_budget=spec.kl_budget, max_perplexity_ratio=2.0,
                           min_distinct_ratio=0.75, prompts=len(spec.prompts), tokens=spec.tokens, plain_hit_rate=0.0,
                           plain_perplexity=5.0, plain_distinct_2=0.9, points=tuple(points), sampling=spec.sampling,
                           chosen=None if found is None else best), ()  # fmt: skip

    class Rates(list):
        """Also what each search was given to beat."""

    rates = Rates()
    rates.incumbents = []
    monkeypatch.setattr("operators.tune.calibrate.search_settings", search_settings)
    return rates


@pytest.mark.parametrize(
    ("before", "now", "more", "kept"),
    [
        (0.9, 0.5, (), True),
        (0.9, None, (), True),
        (0.9, 0.5, ("--replace",), False),
        (0.5, 0.9, (), False),
        (0.9, 0.5, ("--kl-budget", "2"), True),
        (None, 0.5, (), False),
    ],
)
def test_a_better_recommendation_is_replaced_only_on_request(shelf, search, before, now, more, kept):
    directory, run = shelf
    search.extend((before, now))
    assert run("--words", "bay", "--layers", "2").exit_code == 0
    first = Store(directory).load("bay")
    if before is not None:
        # At another strength, so that what comes next is another setting.
        other = first.header.calibration.model_copy(update={"points": (_point(before, 0.3),)})
        recommended = first.header.recommended.model_copy(update={"strength": 0.3})
        first = with_header(first, calibration=other, recommended=recommended)
        Store(directory).save("bay", first, replace=True)
    answer = json.loads(run("--words", "bay", "--layers", "2", *more, "--json").stdout)
    assert (answer["kept"], (search.incumbents[-1] is None)) == (kept, before is None or "--replace" in more)
    after = Store(directory).load("bay")
    assert (after.header.recommended == first.header.recommended) is kept
    assert (after.digest == first.digest) is (now is None)
    assert (answer["previous"] or {}).get("useful_rate") == before


def test_the_plan_is_told_and_nothing_is_changed(shelf):
    directory, run = shelf
    before = Store(directory).load("bay").digest
    result = run("--words", "bay", "--dry-run", "--json")
    plan = json.loads(result.stdout)["plan"]
    assert (len(plan["forms"]), len(plan["stages"])) == (len(ALL_FORMS), 4)
    assert plan["seconds"] > 0
    assert plan["sampling"] == "greedy, repetition penalty 1.2"
    assert "Nothing was changed" in run("--words", "bay", "--dry-run").stdout
    assert Store(directory).load("bay").digest == before
    assert not list(directory.glob(".calibrate*"))


def test_the_command_shows_texts_and_leaves_no_journal(shelf):
    directory, run = shelf
    (directory / "held").write_text("A golden\nIn the bay\n")
    alphabet = ",".join("abcdefghijklmnopqrstuvwxyz")
    loose = ("--max-perplexity-ratio", "1e9", "--min-distinct-ratio", "0", "--kl-budget", "9")
    result = run("--words", alphabet, "--layers", "2", *loose, "--held-out", str(directory / "held"))
    assert result.exit_code == 0
    assert not list(directory.glob(".calibrate*"))
    if Store(directory).load("bay").header.calibration.chosen is not None:
        assert "on 2 held-out prompts" in result.stdout
        assert result.stdout.count("  steered: ") == 2


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (1, (), "operator 'bay' has no words that show its concept; give some: --words"),
        (2, ("--words", "a,,b"), "word '' is blank"),
        (2, ("--words", "a", "--layers", "1,x"), "layers are '1,x'; whole numbers"),
        (2, ("--words", "a", "--kl-budget", "0"), "KL budget is 0"),
        (1, ("--words", "a", "--prompts", "nowhere"), "prompts nowhere: cannot be read"),
        (1, ("--words", "a", "--held-out", "nowhere"), "prompts nowhere: cannot be read"),
        (2, ("--words", "a", "--repetition-penalty", "0"), "repetition_penalty is 0"),
        (2, ("--words", "a", "--top-p", "2"), "top_p is 2"),
        (2, ("--words", "a", "--plot", "c.txt"), "its ending is '.txt'; accepted"),
        (1, ("--words", "a", "--plot", "nowhere/c.png"), "there is no directory"),
    ],
)
def test_bad_input_is_named_before_the_model_is_loaded(shelf, monkeypatch, code, arguments, message):
    monkeypatch.setattr(models, "load_model", lambda *_args, **_kwargs: pytest.fail("the model was loaded"))
    result = shelf[1](*arguments)
    assert result.exit_code == code
    assert message in result.stderr
