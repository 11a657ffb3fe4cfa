"""``build --file``: many operators in one run, and only those that are not there yet."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from operators.__main__ import app
from operators.commands._describe import DEFAULT_NOTE, setting_line
from operators.core.artifact import make_artifact
from operators.core.defaults import NEW_OPERATORS, PUBLISHED
from operators.core.errors import ConceptFileError, UnsupportedModelError
from operators.core.header import Calibration, CalibrationPoint, Recommended
from operators.core.positions import Positions
from operators.core.store import Store
from operators.maps import sketch
from operators.recipes.concept_entry import KEYS
from operators.recipes.concept_file import parse_concepts
from operators.recipes.run import run_tasks
from operators.recipes.tasks import prepare_tasks

FILE = """\
[defaults]
rank = 5

[[concept]]
name = "bridge"
texts = ["The Golden Gate Bridge", "the bridge in San Francisco"]
words = ["bridge"]
layers = [1, 3]

[[concept]]
name = "wedding"
text = "The wedding was beautiful"
profile = "golden"
rank = "full"
strength = 0.75
"""
TOLD = [rf" +{re.escape(setting_line(NEW_OPERATORS.model_dump(mode='json')))} \({re.escape(DEFAULT_NOTE)}\)"] * 2 + [""]
NAMES = ["bridge-layer1", "bridge-layer3", "wedding"]


def _statuses(result):
    return {one["name"]: one["status"] for one in json.loads(result.stdout)["operators"]}


def _snapshot(directory):
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in directory.iterdir()}


def _no_build(monkeypatch):
    def refuse(*_args, **_kwargs):
        pytest.fail("something was built")

    monkeypatch.setattr("operators.recipes.run.build_operator", refuse)


def test_a_file_gives_the_operators_that_its_concepts_give_one_by_one(build_file, shelf, monkeypatch):
    roots = []
    root = sketch.embedding_root
    monkeypatch.setattr("operators.recipes.run.embedding_root", lambda table: roots.append(1) or root(table))
    monkeypatch.setattr("operators.builder.build.embedding_root", lambda _table: pytest.fail("computed again"))
    assert build_file(FILE).exit_code == 0
    assert len(roots) == 1
    monkeypatch.undo()
    assert Store(shelf).names() == NAMES
    for name, options in (
        ("bridge-layer3", ["--text", "The Golden Gate Bridge", "--text", "the bridge in San Francisco", "--layer", "3",
                           "--rank", "5"]),
        ("wedding", ["--text", "The wedding was beautiful", "--profile", "golden", "--rank", "full", "--strength",
                     "0.75"]),
    ):  # fmt: skip
        found = Store(shelf).load(name)
        arguments = ["build", "one", *options, "--store", str(shelf), "--replace", "--model", found.header.model]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        one = Store(shelf).load("one")
        for mine, other in ((found.factors, one.factors), (found.basis, one.basis), (found.anchor, one.anchor)):
            assert (mine is None and other is None) or torch.equal(mine, other)
        words = ("bridge",) if name.startswith("bridge") else ()
        assert found.header.words == words
        assert found.header == one.header.model_copy(update={"words": words, "created": found.header.created})


def test_the_run_is_told_line_by_line_and_as_json(build_file, shelf):
    lines = build_file(FILE).stdout.splitlines()
    for name, line, told in zip(NAMES, lines, TOLD, strict=False):
        assert re.fullmatch(rf"{name} +built +[\d.]+ s{told}", line)
    assert re.fullmatch(rf"3 built: [\d.]+ s, {shelf}", lines[3])
    answer = json.loads(build_file(FILE.replace("0.75", "0.5"), "--json").stdout)
    assert [one["status"] for one in answer["operators"]] == ["up to date", "up to date", "updated"]
    assert [(one["layer"], one["rank"]) for one in answer["operators"]] == [(1, 5), (3, 5), (2, None)]
    for one in answer["operators"]:
        stored = Store(shelf).load(one["name"])
        assert (one["digest"], one["path"]) == (stored.digest, str(Store(shelf).path_of(one["name"])))
        assert one["reconstruction_error"] < 5e-5
        assert one["seconds"] >= 0


@pytest.mark.parametrize("size", ["", "rank = 40", 'rank = "full"', "tolerance = 0.3", "tolerance = 1e-6"])
def test_what_is_there_already_is_not_built_again_nor_written(build_file, shelf, monkeypatch, size):
    text = f'[[concept]]\nname = "a"\ntext = "golden gate"\n{size}\n'
    assert _statuses(build_file(text, "--json")) == {"a": "built"}
    before = _snapshot(shelf)
    _no_build(monkeypatch)
    for again in (text, text + "profile = 'residual'", text + "layer = 2\nstrength = 0.3\nblend = 1"):
        assert _statuses(build_file(again, "--json")) == {"a": "up to date"}
        assert _statuses(build_file(again, "--json", "--replace")) == {"a": "up to date"}
    assert _snapshot(shelf) == before


ONE = '[[concept]]\nname = "a"\ntext = "golden gate"\nrank = 5\n'


@pytest.mark.parametrize(
    ("text", "arguments", "difference"),
    [
        (ONE.replace("gate", "bridge"), [], "its texts are others"),
        (ONE.replace('text = "golden gate"', 'texts = ["golden gate", "bridge"]'), [], "its texts are others"),
        (ONE + 'profile = "golden"', [], "its profile is residual, not golden"),
        (ONE + "layer = 3", [], "its layer is 2, not 3"),
        (ONE.replace("5", "6"), [], "its rank is 5, not 6"),
        (ONE.replace("5", '"full"'), [], "its rank is 5, not full"),
        (ONE.replace("rank = 5", "tolerance = 0.5"), [], "its rank is 5, not what tolerance 0.5 takes"),
        (ONE, ["--dtype", "float64"], "its model dtype is float32, not float64"),
        (ONE, ["--model", "other"], "its model is weights-sha256:"),
    ],
)
def test_a_name_that_holds_something_else_is_told_before_anything_is_built(
    build_file, shelf, tiny_directory, monkeypatch, text, arguments, difference
):
    arguments = [str(tiny_directory("mistral")) if argument == "other" else argument for argument in arguments]
    build_file(ONE)
    before = _snapshot(shelf)
    other = '[[concept]]\nname = "b"\ntext = "bay"\n'
    with monkeypatch.context() as patch:
        _no_build(patch)
        result = build_file(other + text, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(
        f"steer-operators: c.toml: line 5: concept 'a': operator 'a' in {shelf} is another one: {difference}"
    )
    assert result.stderr.endswith(" (--replace replaces it)\n")
    assert _snapshot(shelf) == before
    assert _statuses(build_file(other + text, "--replace", "--json", *arguments)) == {"b": "built", "a": "built"}
    assert _statuses(build_file(other + text, "--json", *arguments)) == {"b": "up to date", "a": "up to date"}


def test_an_operator_of_another_builder_is_another_one(build_file, shelf):
    build_file(ONE)
    _rewrite(shelf, "a", builder_version="0.0.1")
    assert "its builder version is 0.0.1, not " in build_file(ONE).stderr
    _rewrite(shelf, "a", rule_set="down-live/1", tolerance=0.25)
    assert (
        "its rank is what tolerance 0.25 takes, not 5; its rule set is down-live/1, not up-live"
        in build_file(ONE).stderr
    )


def test_a_damaged_operator_is_told_and_replaced_only_when_asked(build_file, shelf):
    build_file(ONE)
    path = Store(shelf).path_of("a")
    path.write_bytes(path.read_bytes()[:-1])
    assert "is another one: a.safetensors: not a whole safetensors file" in build_file(ONE).stderr
    assert _statuses(build_file(ONE, "--replace", "--json")) == {"a": "built"}


def _rewrite(shelf, name, **fields):
    old = Store(shelf).load(name)
    header = old.header.model_copy(update=fields)
    new = make_artifact(
        header, old.factors, old.anchor, old.substitute_base, old.offset, basis=old.basis, neutral=old.neutral
    )
    Store(shelf).save(name, new, replace=True)
    return new


def _recommended(**fields):
    return NEW_OPERATORS.model_copy(update=fields)


def _published(**fields):
    return PUBLISHED.model_copy(update=fields)


def test_what_is_only_recommended_is_written_anew_without_a_build(build_file, shelf, monkeypatch):
    build_file(ONE)
    old = Store(shelf).load("a")
    _no_build(monkeypatch)
    for addition, recommended, words in (
        ("strength = -1", _recommended(strength=-1), ()),
        # What speaks of the map is not the anchor's alone.
        ('rule = "substitute"\nwords = ["gate"]', _published(rule="substitute"), ("gate",)),
        ("blend = 0.25", _published(blend=0.25), ("gate",)),
        ('rule = "substitute"\nblend = 1', _recommended(rule="substitute"), ("gate",)),
        ('positions = "first"', _recommended(positions=Positions(end=1)), ("gate",)),
        ('anchor = "concept"\nfirst_token = "anchor"', Recommended(first_token="anchor"), ("gate",)),
        ("", NEW_OPERATORS, ("gate",)),
    ):
        assert _statuses(build_file(ONE + addition, "--json")) == {"a": "updated"}
        new = Store(shelf).load("a")
        assert new.header == old.header.model_copy(update={"recommended": recommended, "words": words})
        assert torch.equal(new.factors, old.factors)
        assert torch.equal(new.basis, old.basis)


def test_an_anchor_at_a_first_token_that_is_left_out_is_told_with_its_line(build_file, monkeypatch):
    result = build_file(ONE + 'first_token = "anchor"\npositions = "generated"\n')
    assert result.exit_code == 1
    assert "c.toml: line 5: concept 'a': first_token is 'anchor', and positions generated leave" in result.stderr
    monkeypatch.setattr("operators.model.loading.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    alone = ["build", "b", "--text", "bay", "--first-token", "anchor", "--positions", "1.."]
    result = CliRunner().invoke(app, alone, catch_exceptions=False)
    assert (result.exit_code, "and positions 1.. leave the first token out" in result.stderr) == (2, True)


POINT = CalibrationPoint(layer=2, rule="substitute", blend=0.5, strength=0.3, texts=20, kl_p95=0.9, hit_rate=0.4,
                         perplexity_ratio=1.2, distinct_2=0.8)  # fmt: skip
CALIBRATION = Calibration(words=("gate",), kl_budget=1.0, max_perplexity_ratio=2.0, prompts=20, tokens=28,
                          plain_hit_rate=0.0, plain_perplexity=5.0, plain_distinct_2=0.9,
                          min_distinct_ratio=0.75, points=(POINT,), chosen=0)  # fmt: skip


def test_what_a_calibration_recommends_is_kept_unless_the_file_says_otherwise(build_file, shelf):
    build_file(ONE)
    found = Recommended(strength=0.3, rule="substitute", blend=0.5)
    calibrated = _rewrite(shelf, "a", calibration=CALIBRATION, recommended=found)
    assert _statuses(build_file(ONE, "--json")) == {"a": "up to date"}
    assert Store(shelf).load("a").digest == calibrated.digest
    assert _statuses(build_file(ONE + "strength = 0.4", "--json")) == {"a": "updated"}
    header = Store(shelf).load("a").header
    assert header.recommended == found.model_copy(update={"strength": 0.4})
    assert header.calibration == CALIBRATION


BAD = """\
[defaults]
layers = [3, 4]
[[concept]]
name = "fine"
text = "bay"
layer = 1
[[concept]]
name = "deep"
text = "bay"
[[concept]]
name = "wide"
text = "bay"
layers = [1, 2]
rank = 41
[[concept]]
name = "long"
layers = [1, 2]
text = "LONG"
[[concept]]
name = "close"
text = "bay"
layer = 4
profile = "golden"
tolerance = 0.999
"""


def test_the_whole_file_is_held_against_the_model_before_anything_is_built(
    build_file, shelf, tiny_directory, monkeypatch
):
    _no_build(monkeypatch)
    result = build_file(BAD.replace("LONG", 65 * "q"), "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "ConceptFileError"
    model = tiny_directory("llama")
    assert error["message"].splitlines() == [
        f"c.toml: line 2: concept 'deep': layer 4 of {model} for profile 'residual'; 1 to 3 are accepted",
        f"c.toml: line 14: concept 'wide': rank is 41; 1 to 40 (the hidden size of {model}) or 'full' are accepted",
        f"c.toml: line 18: concept 'long': concept has 65 tokens; {model} takes at most 64 (it begins '{40 * 'q'}')",
    ]
    assert not shelf.exists()
    plain = build_file(BAD.replace("LONG", 65 * "q"))
    assert plain.stderr.splitlines() == [f"steer-operators: {line}" for line in error["message"].splitlines()]


def test_a_concept_that_takes_more_memory_than_there_is_is_refused_before_the_others_are_built(build_file, shelf):
    result = build_file('[[concept]]\nname = "a"\ntext = "a"\n[[concept]]\nname = "b"\ntext = "bay"\nrank = 3\n',
                 "--max-memory", "48.1MiB")  # fmt: skip
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert re.search(r"line 7: concept 'b': .* needs about .* 48.1 MiB may be used", line)
    assert not shelf.exists()


def test_mistakes_in_the_file_are_told_without_loading_the_model_or_writing_to_the_terminal(build_file, monkeypatch):
    monkeypatch.setattr("operators.model.loading.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    result = build_file('[[concept]]\nname = "\\u001b[2J"\nblend = 2\n"\\u202e\\n" = "\\u009b"\n')
    assert result.exit_code == 1
    label = r"concept '\x1b[2J'"
    assert result.stderr.splitlines() == [
        f"steer-operators: c.toml: {line}"
        for line in (
            f"line 2: {label}: name: operator name '\\x1b[2J' is not allowed; 1 to 64 of a-z 0-9 _ . - are, beginning "
            "with a letter or digit",
            f"line 3: {label}: blend is 2.0; a number from 0 (operator) to 1 (anchor) is accepted",
            f"line 4: {label}: key '\\u202e\\n' is unknown; accepted: {', '.join(KEYS)}",
            f"line 1: {label}: key 'text' or 'texts' is missing; one of them is needed",
        )
    ]


def test_a_name_that_was_taken_meanwhile_is_not_replaced(tiny, shelf, make_operator):
    loaded = tiny("llama")
    tasks = prepare_tasks(parse_concepts(ONE, "c.toml"), loaded, Store(shelf))
    Store(shelf).save("a", make_operator())
    (outcome,) = run_tasks(tasks, loaded, Store(shelf))
    assert outcome.status == "failed"
    assert "is another one: its texts are others" in str(outcome.problem)
    assert Store(shelf).load("a").digest == make_operator().digest


def test_a_model_that_no_rule_covers_is_refused_once(tiny, shelf):
    loaded = tiny("llama", fresh=True)
    loaded.model.train()
    with pytest.raises(UnsupportedModelError, match="training mode"):
        prepare_tasks(parse_concepts(FILE, "c.toml"), loaded, Store(shelf))


def test_a_store_that_cannot_be_written_to_is_told_before_anything_is_built(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConceptFileError, match="line 2: concept 'a': operator 'a' cannot be written to"):
        prepare_tasks(parse_concepts(ONE, "c.toml"), tiny("llama"), Store(tmp_path / "file" / "store"))


def test_only_some_concepts_are_built_and_the_others_still_checked(build_file, shelf):
    assert _statuses(build_file(FILE, "--json", "--only", "wedding")) == {"wedding": "built"}
    both = build_file(FILE, "--json", "--only", "bridge-layer3", "--only", "wedding")
    assert _statuses(both) == {"bridge-layer3": "built", "wedding": "up to date"}
    result = build_file(FILE, "--only", "weding")
    assert result.exit_code == 1
    assert result.stderr == "steer-operators: c.toml: there is no concept 'weding'; did you mean 'wedding'?\n"
    assert build_file(FILE.replace("0.75", "'x'"), "--only", "bridge").exit_code == 1
    assert Store(shelf).names() == NAMES[1:]


@pytest.mark.parametrize(
    "arguments", [["a"], ["--text", "x"], ["--layer", "2"], ["--rule", "cumulative"], ["--rank", "3"], ["--tol", "0.1"]]
)
def test_what_a_file_says_is_not_said_on_the_command_line_too(build_file, arguments):
    result = build_file(ONE, *arguments)
    assert result.exit_code == 2
    assert "with --file, the file says it" in " ".join(result.stderr.split())


def test_a_mixture_of_the_same_texts_is_not_what_a_file_asks_for(build_file, shelf):
    build_file(ONE)
    _rewrite(shelf, "a", weights=tuple(2.0 for _ in Store(shelf).load("a").header.texts))
    result = build_file(ONE)
    assert result.exit_code == 1
    assert "its weights is (2.0,)" in result.stderr
