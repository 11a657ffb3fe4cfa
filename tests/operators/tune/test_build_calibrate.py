"""``build --calibrate``: what is calibrated, at which layers and by which words, and what is told of it."""

import json
import re

import pytest
from typer.testing import CliRunner

from operators.__main__ import app
from operators.commands import _build_file as command
from operators.core.artifact import with_header
from operators.core.claims import claim
from operators.core.defaults import NEW_OPERATORS
from operators.core.header import Calibration, CalibrationPoint, Recommended
from operators.core.store import Store
from operators.model import loading as models
from operators.tune import journal as journal_file
from operators.tune.candidates import CandidateEvaluator

OPEN = '[[concept]]\nname = "a"\ntext = "The Golden Gate"\nrank = 5\nwords = ["gate"]\n'
FOUND = Recommended(strength=0.3, rule="substitute", blend=0.5)


def _calibration(layer, words=("gate",), chosen=0):
    point = CalibrationPoint(layer=layer, **FOUND.model_dump(), texts=20, kl_p95=0.9, hit_rate=0.4,
                             perplexity_ratio=1.2, distinct_2=0.8)  # fmt: skip
    return Calibration(words=words, kl_budget=1.0, max_perplexity_ratio=2.0, prompts=20, tokens=28, plain_hit_rate=0.0,
                       plain_perplexity=5.0, plain_distinct_2=0.9, min_distinct_ratio=0.75, points=(point,),
                       chosen=chosen)  # fmt: skip


@pytest.fixture
def explored(monkeypatch):
    """The (layers, words) of every calibration; the lowest layer is the best one."""
    asked = []

    def search_settings(_operators, layers, _loaded, spec, **_):
        asked.append((tuple(layers), spec.words))
        return _calibration(min(layers), spec.words), ()

    monkeypatch.setattr("operators.tune.calibrate.search_settings", search_settings)
    return asked


@pytest.fixture
def unfruitful(monkeypatch):
    """The layers of every calibration, none of which finds anything."""
    asked = []

    def search_settings(_operators, layers, _loaded, spec, **_):
        asked.append(tuple(layers))
        return _calibration(min(layers), spec.words, chosen=None), ()

    monkeypatch.setattr("operators.tune.calibrate.search_settings", search_settings)
    return asked


def _statuses(result):
    assert result.exit_code == 0, result.output
    return {one["name"]: one["status"] for one in json.loads(result.stdout)["operators"]}


def _layers(shelf):
    return {name: Store(shelf).load(name).header.layer for name in Store(shelf).names()}


def test_what_the_file_leaves_open_is_calibrated_once_and_may_move(build_file, shelf, explored):
    text = OPEN + '[[concept]]\nname = "fixed"\ntext = "The Golden Gate"\nstrength = 0.3\n'
    assert _statuses(build_file(text, "--json", "--calibrate")) == {"a": "built", "fixed": "built"}
    assert explored == [((1, 2, 3), ("gate",))]
    assert _layers(shelf) == {"a": 1, "fixed": 2}
    assert Store(shelf).load("a").header.recommended == FOUND
    assert Store(shelf).load("fixed").header.calibration is None
    for more in ([], ["--calibrate"]):
        assert _statuses(build_file(text, "--json", *more)) == {"a": "up to date", "fixed": "up to date"}
    assert len(explored) == 1


def test_what_is_there_uncalibrated_is_calibrated_without_a_build_at_its_layer(build_file, shelf, explored):
    build_file(OPEN + "layer = 3")
    assert _statuses(build_file(OPEN + "layer = 3", "--json", "--calibrate")) == {"a": "updated"}
    assert explored == [((3,), ("gate",))]


def test_a_layer_that_the_file_names_is_the_only_one_that_is_tried(build_file, shelf, explored):
    text = OPEN + "layers = [2, 3]\n" + OPEN.replace('"a"', '"b"') + "layer = 3\n"
    names = ["a-layer2", "a-layer3", "b"]
    assert _statuses(build_file(text, "--json", "--calibrate")) == dict.fromkeys(names, "built")
    assert [layers for layers, _ in explored] == [(2,), (3,), (3,)]
    assert list(_layers(shelf).values()) == [2, 3, 3]
    assert _statuses(build_file(text, "--json", "--calibrate")) == dict.fromkeys(names, "up to date")


@pytest.mark.parametrize("more", ["", "layer = 2\n"])
def test_other_words_are_calibrated_anew_from_what_the_file_says(build_file, shelf, explored, more):
    build_file(OPEN + more, "--calibrate")
    other = OPEN.replace('"gate"', '"bay", "bridge"') + more
    status = "updated" if more else "built"
    assert _statuses(build_file(other, "--json", "--calibrate")) == {"a": status}
    layers = (2,) if more else (1, 2, 3)
    assert explored == [(layers, ("gate",)), (layers, ("bay", "bridge"))]
    header = Store(shelf).load("a").header
    assert header.words == header.calibration.words == ("bay", "bridge")
    assert _statuses(build_file(other, "--json", "--calibrate")) == {"a": "up to date"}


def test_other_words_without_a_calibration_leave_the_one_that_is_there(build_file, shelf, explored):
    build_file(OPEN, "--calibrate")
    before = Store(shelf).load("a").header
    other = OPEN.replace('"gate"', '"bay"')
    assert _statuses(build_file(other, "--json")) == {"a": "updated"}
    assert Store(shelf).load("a").header == before.model_copy(update={"words": ("bay",)})
    # Its layer is that of the calibration, which is still there and says by which words it was made.
    assert _statuses(build_file(other, "--json")) == {"a": "up to date"}
    assert _statuses(build_file(other, "--json", "--calibrate")) == {"a": "built"}
    assert [words for _, words in explored] == [("gate",), ("bay",)]


def test_words_are_held_against_those_of_the_calibration(build_file, shelf, explored):
    build_file(OPEN.replace('words = ["gate"]', ""))
    # As `calibrate NAME --words gate` leaves it.
    old = Store(shelf).load("a")
    Store(shelf).save("a", with_header(old, calibration=_calibration(2)), replace=True)
    assert _statuses(build_file(OPEN, "--json", "--calibrate")) == {"a": "updated"}
    assert not explored
    assert _statuses(build_file(OPEN.replace('words = ["gate"]', ""), "--json", "--calibrate")) == {"a": "up to date"}


def test_words_that_are_missing_are_told_with_their_line_before_the_model_is_loaded(build_file, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    wordless = '[[concept]]\nname = "b"\ntext = "bay"\nlayers = [1, 2]\n'
    fixed = '[[concept]]\nname = "c"\ntext = "bay"\nblend = 1\n'
    result = build_file(OPEN + wordless + fixed, "--calibrate")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "steer-operators: c.toml: line 6: concept 'b': key 'words' is needed for --calibrate: what shows the concept "
        "in a text\n"
    )


def test_words_are_asked_for_only_where_a_calibration_will_be_made(build_file, shelf, explored):
    wordless = OPEN.replace('words = ["gate"]', "")
    build_file(OPEN)
    # It has the words that it was built with.
    assert _statuses(build_file(wordless, "--json", "--calibrate")) == {"a": "updated"}
    assert explored == [((1, 2, 3), ("gate",))]
    assert _statuses(build_file(wordless, "--json", "--calibrate")) == {"a": "up to date"}
    # Another one is built in its place, and nobody says by which words.
    result = build_file(wordless.replace("rank = 5", "rank = 4"), "--calibrate", "--replace")
    assert result.exit_code == 1
    assert "c.toml: line 1: concept 'a': key 'words' is needed for --calibrate" in result.stderr
    assert Store(shelf).load("a").header.low_rank.rank == 5


def test_what_was_found_is_told_with_the_setting(build_file, explored):
    told = build_file(OPEN, "--calibrate").stdout.splitlines()[0]
    assert re.fullmatch(r"a +built +[\d.]+ s  recommended: layer 1, strength 0\.3, substitute, blend 0\.5", told)
    (one,) = json.loads(build_file(OPEN, "--json").stdout)["operators"]
    assert (one["found"], one["recommended"], one["layer"]) == (True, FOUND.model_dump(), 1)


def test_a_calibration_that_found_nothing_is_told_as_such(build_file, unfruitful):
    told = build_file(OPEN, "--calibrate").stdout.splitlines()[0]
    assert told.endswith(
        "  nothing within the bounds was found, and the default is kept: layer 2, strength 0.3, cumulative, blend 1, "
        "contrast anchor"
    )
    (one,) = json.loads(build_file(OPEN, "--json").stdout)["operators"]
    assert (one["found"], one["recommended"]) == (False, NEW_OPERATORS.model_dump())
    assert (
        build_file(OPEN + "strength = 0.4")
        .stdout.splitlines()[0]
        .endswith(
            "nothing within the bounds was found, and what was recommended is kept: layer 2, strength 0.4, cumulative, "
            "blend 1, contrast anchor"
        )
    )
    plain = OPEN.replace('"a"', '"b"')
    (one,) = json.loads(build_file(plain, "--json").stdout)["operators"]
    assert one["found"] is None


@pytest.mark.usefixtures("build_file")
def test_one_operator_is_calibrated_at_the_layer_that_is_given_and_says_where_nothing_was_found(shelf, unfruitful):
    build = ["build", "a", "--text", "The bay", "--words", "neverwritten", "--calibrate", "--replace"]
    told = CliRunner().invoke(app, [*build, "--layer", "3"], catch_exceptions=False).stdout
    assert "nothing within the bounds was found, and the default is kept; 20 prompts" in told
    assert _layers(shelf) == {"a": 3}
    assert json.loads(CliRunner().invoke(app, [*build, "--json"], catch_exceptions=False).stdout)["found"] is False
    assert unfruitful == [(3,), (1, 2, 3)]


def test_a_calibration_goes_on_the_bars_of_the_batch(build_file, explored, monkeypatch):
    monkeypatch.setattr("operators.core.progress.progress_bars", lambda: pytest.fail("other bars were drawn"))
    told = []
    calibrate = command.calibrate_new
    monkeypatch.setattr(
        command,
        "calibrate_new",
        lambda *args, progress, **kwargs: told.append(progress) or calibrate(*args, progress=progress, **kwargs),
    )
    assert build_file(OPEN, "--calibrate").exit_code == 0
    assert told[0].args[0].name == "a"


ALPHABET = ",".join("abcdefghijklmnopqrstuvwxyz")


@pytest.fixture
def build(shelf, build_file, monkeypatch):
    """``build(...)``: one operator with ``--calibrate``, on few prompts; ``build.decoded`` counts trials."""
    monkeypatch.setattr("operators.tune.prompts.calibration_prompts", lambda: ("The bay", "My dress"))
    monkeypatch.setattr("operators.tune.calibration_spec.neutral_prompts", lambda: ("A golden",))
    real, decoded = CandidateEvaluator.evaluate, []

    def evaluate(self, trials, *args, **kwargs):
        points = real(self, trials, *args, **kwargs)
        decoded.append(len(trials))
        if build.stop_after == len(decoded):
            raise KeyboardInterrupt
        return points

    def build(*more):
        build.decoded.clear()
        command = ["build", "a", "--text", "The bay", "--words", ALPHABET, "--layer", "2", "--calibrate", *more]
        return CliRunner().invoke(app, command, catch_exceptions=False)

    build.decoded, build.stop_after = decoded, None
    monkeypatch.setattr(CandidateEvaluator, "evaluate", evaluate)
    return build


def test_a_build_that_is_stopped_amid_its_calibration_goes_on_with_it(build, shelf, monkeypatch):
    build.stop_after = 2
    stopped = build("--quick")
    assert stopped.exit_code == 130
    kept = int(re.search(r"stopped; (\d+) settings that were measured for 'a' are kept in ", stopped.stderr)[1])
    assert kept > 0
    assert Store(shelf).names() == []
    journal = shelf / ".calibrate-a.jsonl"
    assert len(journal.read_text().splitlines()) == kept + 1
    assert list(shelf.iterdir()) == [journal]
    build.stop_after = None
    resumed = []
    read = journal_file._read
    monkeypatch.setattr(journal_file, "_read", lambda *args: resumed.append(read(*args)) or dict(resumed[-1]))
    # The same operator, built at another time.
    done = build("--quick", "--json")
    assert done.exit_code == 0, done.output
    assert len(resumed[0]) == kept
    points = json.loads(done.stdout)["calibration"]["points"]
    assert len(points) > kept
    assert list(shelf.iterdir()) == [Store(shelf).path_of("a")]


@pytest.mark.parametrize("quick", [False, True])
def test_a_quick_build_calibrates_quickly(explored, build_file, shelf, monkeypatch, quick):
    specs = []
    real = command.calibrate_new
    monkeypatch.setattr(
        command, "calibrate_new", lambda *args, **kwargs: specs.append(kwargs["quick"]) or real(*args, **kwargs)
    )
    build_file(OPEN, "--calibrate", *["--quick"] * quick)
    assert specs == [quick]
    assert len(explored[0][0]) == (2 if quick else 3)
    build = ["build", "b", "--text", "The bay", "--words", "bay", "--calibrate", *["--quick"] * quick]
    assert CliRunner().invoke(app, build, catch_exceptions=False).exit_code == 0
    assert explored[1][0] == explored[0][0]
    refused = CliRunner().invoke(app, ["build", "b", "--text", "The bay", "--quick"])
    assert (refused.exit_code, "--quick is of --calibrate" in refused.stderr) == (2, True)


def test_two_calibrations_of_one_operator_at_once_are_refused_by_name(build_file, shelf, explored):
    build_file(OPEN)
    with claim(Store(shelf), "a", "a calibration"):
        result = build_file(OPEN + OPEN.replace('"a"', '"b"'), "--calibrate", "--json")
        assert result.exit_code == 1
        first, second = json.loads(result.stdout)["operators"]
        assert (first["status"], second["status"]) == ("failed", "built")
        assert "operator 'a' in" in first["problem"]["message"]
        assert "a calibration by process" in first["problem"]["message"]
        for command_line in (
            ["calibrate", "a"],
            ["build", "a", "--text", "The Golden Gate", "--words", "gate", "--calibrate", "--replace"],
        ):
            alone = CliRunner().invoke(app, command_line, catch_exceptions=False)
            assert (alone.exit_code, "is in use: a calibration by process" in alone.stderr) == (1, True)
    assert [path.name for path in sorted(shelf.iterdir())] == ["a.safetensors", "b.safetensors"]
