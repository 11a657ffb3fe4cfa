"""Calibration: the curves, the choice among them, and the command."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from operators import __main__ as cli
from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.memory import estimate_trial
from operators.builder.spec import BuildSpec
from operators.builder.verify import verify_operator
from operators.core.apply import Setting, prepare
from operators.core.errors import BuildError, IncompatibleOperatorError, OperatorError
from operators.core.header import Calibration, CalibrationPoint, Recommended
from operators.core.store import Store
from operators.model import loading as models
from operators.tune.calibrate import calibrate, candidate_layers
from operators.tune.calibration_spec import CalibrationSpec
from operators.tune.continuations import ContinuationRequest, Injection, decode_continuations
from operators.tune.metrics import WordList, compute_metrics
from operators.tune.prompts import calibration_prompts
from operators.tune.setting_search import FINAL_ROUNDS, FINALISTS, SCOUT_PROMPTS, WEAKER, search_settings
from operators.tune.strength_search import FIRST_STRENGTH

PROMPTS = ("The bay", "Here is a painting of the", "My dress")
TEXT = "The bay"
NOWHERE = ("neverwritten",)


@pytest.fixture(scope="module")
def operator(tiny):
    loaded = tiny("llama", dtype="float32")
    concept = concept_from_text(TEXT, loaded)
    recommended = Recommended(strength=0.7, rule="substitute", blend=0.25)
    return build_operator(BuildSpec((concept,), layer=2, rank=5, recommended=recommended), loaded)


def _spec(**fields):
    return CalibrationSpec(
        **{
            "words": NOWHERE,
            "prompts": PROMPTS,
            "kl_budget": 2.0,
            "max_perplexity_ratio": 1e9,
            "min_distinct_ratio": 0,
            "tokens": 5,
            **fields,
        }
    )


def _telling(loaded, operator):
    """Some words that pushed texts hold and plain ones do not."""
    prompts = [tuple(loaded.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    push = Injection(prepare(operator, loaded.device), 2, Setting(0.5, "cumulative", 0.5))
    plain, pushed = (
        decode_continuations([ContinuationRequest(ids, one) for ids in prompts], loaded, tokens=5)
        for one in (None, push)
    )
    words = [
        {"".join(filter(str.isalpha, loaded.tokenizer.decode(t))) for x in xs for t in x.ids} for xs in (plain, pushed)
    ]
    return tuple(sorted(words[1] - words[0] - {""}))


def test_the_choice_is_the_best_of_the_curves_and_the_curves_are_what_single_trials_give(tiny, operator):
    loaded = tiny("llama", dtype="float32")
    words = _telling(loaded, operator)
    spec = _spec(words=words, layers=(1, 2, 3))
    calibrated = calibrate(operator, loaded, spec)
    found = calibrated.header.calibration
    assert found.chosen is not None
    best = found.points[found.chosen]
    good = [p for p in found.points if p.kl_p95 <= 2.0 and p.hit_rate > found.plain_hit_rate]
    assert best.hit_rate == max(point.hit_rate for point in good)
    # At all positions: those are measured.
    assert (best.layer, best.strength, best.rule, best.blend, "all", "concept", "operator") == (
        calibrated.header.layer,
        *calibrated.header.recommended.model_dump().values(),
    )
    assert {(p.layer, p.rule, p.blend) for p in found.points} == {
        (layer, *rest)
        for layer in (1, 2, 3)
        for rest in [*itertools.product(("cumulative", "substitute"), (0.0, 0.5)), ("cumulative", 1.0)]
    }
    rows = [ContinuationRequest(tuple(loaded.tokenizer(prompt)["input_ids"])) for prompt in PROMPTS]
    plain = compute_metrics(decode_continuations(rows, loaded, tokens=5), WordList(words), loaded)
    assert (found.plain_hit_rate, found.plain_distinct_2) == (plain.hit_rate, plain.distinct_2)
    at_best = Injection(prepare(calibrated, loaded.device), best.layer, Setting(best.strength, best.rule, best.blend))
    alone = [decode_continuations([ContinuationRequest(row.ids, at_best)], loaded, tokens=5)[0] for row in rows]
    again = compute_metrics(alone, WordList(words), loaded)
    assert (again.hit_rate, again.distinct_2) == (best.hit_rate, best.distinct_2)
    assert again.kl_p95 == pytest.approx(best.kl_p95, rel=1e-3)
    assert again.perplexity / plain.perplexity == pytest.approx(best.perplexity_ratio, rel=1e-3)


def test_the_operator_is_built_again_at_the_chosen_layer_and_keeps_everything_else(tiny, operator):
    loaded = tiny("llama", dtype="float32")
    spec = _spec(words=_telling(loaded, operator), layers=(1,))
    calibrated = calibrate(operator, loaded, spec)
    assert calibrated.header.layer == calibrated.header.injection_layer == 1
    assert calibrated.header.texts == operator.header.texts
    assert calibrated.header.low_rank.rank == 5
    assert verify_operator(calibrated, loaded) < 5e-5


def test_where_nothing_is_found_the_recommendation_stays_and_the_curves_are_kept(tiny, operator):
    calibrated = calibrate(operator, tiny("llama", dtype="float32"), _spec(layers=(1, 2)))
    assert calibrated.header.calibration.chosen is None
    assert len(calibrated.header.calibration.points) >= 10
    assert calibrated.header.recommended == operator.header.recommended
    assert calibrated.header.layer == 2
    assert torch.equal(calibrated.factors, operator.factors)


@pytest.mark.parametrize("bound", [{"max_perplexity_ratio": 1e-6}, {"min_distinct_ratio": 1.0}])
def test_where_texts_are_not_fluent_weaker_pushes_are_tried_and_none_wins_outside_the_bounds(tiny, operator, bound):
    loaded = tiny("llama", dtype="float32")
    spec = _spec(words=_telling(loaded, operator), rules=("cumulative",), blends=(0.5,), **bound)
    # A budget that the first strength of the only candidate is close to.
    spec = dataclasses.replace(spec, kl_budget=search_settings({2: operator}, loaded, spec).points[0].kl_p95 / 0.95)
    found = search_settings({2: operator}, loaded, spec)
    strengths = [point.strength for point in found.points]
    if "max_perplexity_ratio" in bound:
        assert found.chosen is None
        assert strengths == pytest.approx([FIRST_STRENGTH * WEAKER**k for k in range(FINAL_ROUNDS)], rel=0.01)
    for point in found.points:
        fluent = point.perplexity_ratio <= spec.max_perplexity_ratio
        distinct = point.distinct_2 >= spec.min_distinct_ratio * found.plain_distinct_2
        expected = point.kl_p95 <= spec.kl_budget and fluent and distinct
        assert spec.admits(point, found.plain_distinct_2) is expected
    assert found.chosen is None or spec.admits(found.points[found.chosen], found.plain_distinct_2)


def test_many_candidates_are_looked_at_on_a_few_prompts_first(tiny, operator):
    loaded = tiny("llama", dtype="float32")
    prompts = tuple(f"The bay {k}" for k in range(SCOUT_PROMPTS + 2))
    told = []
    found = search_settings(
        {2: operator},
        loaded,
        _spec(prompts=prompts, blends=(0.0, 0.2, 0.4), tokens=2),
        progress=lambda *now: told.append(now),
    )
    assert {point.texts for point in found.points} == {2 + SCOUT_PROMPTS}, "six places for six candidates"
    told_of_few, told = told, []
    operators = {
        layer: build_operator(BuildSpec((concept_from_text(TEXT, loaded),), layer=layer), loaded) for layer in (1, 2)
    }
    found = search_settings(operators, loaded, _spec(prompts=prompts, tokens=2), progress=lambda *now: told.append(now))
    scouts = {(p.layer, p.rule, p.blend) for p in found.points if p.texts == SCOUT_PROMPTS}
    finals = {(p.layer, p.rule, p.blend) for p in found.points if p.texts == len(prompts)}
    assert len(scouts) == 10
    assert finals < scouts
    assert sorted(blend for _, _, blend in finals) == sorted([0.0, 0.5, 1.0] * FINALISTS)
    assert all(done <= total for _, done, total in told)
    for run in (told, told_of_few):
        dones, totals = [done for _, done, _ in run], {total for _, _, total in run}
        assert len(totals) == 1, "a time left can be told only of a total that stays"
        assert dones == sorted(dones)
        assert dones[-1] == totals.pop()


def test_default_layers_are_the_operators_own_and_others_over_the_middle(operator, make_operator):
    assert candidate_layers(operator, None) == (1, 2, 3)
    assert candidate_layers(make_operator(num_layers=30), None) == (2, 9, 12, 15, 18, 21, 24)
    at_20 = make_operator(num_layers=30, layer=20, injection_layer=20)
    assert candidate_layers(at_20, None) == (9, 12, 15, 18, 20, 21, 24)
    assert candidate_layers(operator, (3, 1, 3)) == (1, 3)


def test_little_memory_gives_the_same_curves_in_smaller_batches(tiny, operator, monkeypatch):
    loaded = tiny("llama", dtype="float32")
    spec = _spec(rules=("cumulative",), blends=(0.5,))
    plenty = search_settings({2: operator}, loaded, spec)
    longest = max(len(loaded.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS) + 5
    need, sizes = estimate_trial(loaded, longest), []
    monkeypatch.setattr(
        "operators.tune.candidates.decode_continuations",
        lambda rows, *args, texts_per_batch, **more: (
            sizes.append(texts_per_batch) or decode_continuations(rows, *args, texts_per_batch=texts_per_batch, **more)
        ),
    )
    little = search_settings({2: operator}, loaded, spec, max_memory=2 * need.per_row)
    assert set(sizes) == {2}
    assert [point.kl_p95 for point in little.points] == pytest.approx(
        [point.kl_p95 for point in plenty.points], rel=1e-3
    )
    with pytest.raises(BuildError, match=rf"a text of {longest} tokens of tiny-llama.* needs about .* 9 bytes may be"):
        search_settings({2: operator}, loaded, spec, max_memory=9)


def test_the_candidates_share_the_memory_with_each_other_and_their_texts(tiny, operator, monkeypatch):
    loaded, budgets = tiny("llama", dtype="float32"), []
    monkeypatch.setattr(
        "operators.tune.calibrate.build_operator",
        lambda *args, max_memory, **more: budgets.append(max_memory) or build_operator(*args, **more),
    )
    found = search_settings({2: operator}, loaded, _spec(rules=("cumulative",), blends=(1.0,)))
    monkeypatch.setattr(
        "operators.tune.calibrate.search_settings", lambda *_, max_memory, **__: budgets.append(max_memory) or found
    )
    size, budget = operator.nbytes, 1 << 30
    calibrate(operator, loaded, _spec(layers=(1, 2, 3)), max_memory=budget)
    assert budgets == [budget - 2 * size] * 2 + [budget - 3 * size]
    with pytest.raises(BuildError, match=r"operators at 3 layers need more than .* KiB .*; .* KiB may be used"):
        calibrate(operator, loaded, _spec(layers=(1, 2, 3)), max_memory=2 * size)


def test_another_model_and_a_layer_that_does_not_exist_are_refused_by_name(tiny, operator):
    with pytest.raises(IncompatibleOperatorError, match="tiny-qwen2"):
        calibrate(operator, tiny("qwen2", dtype="float32"), _spec())
    with pytest.raises(BuildError, match="layer 9 of tiny-llama"):
        calibrate(operator, tiny("llama", dtype="float32"), _spec(layers=(2, 9)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": ()}, "no prompts"),
        ({"words": ()}, "no words"),
        ({"rules": ("average",)}, "rule is 'average'"),
        ({"blends": (0.5, 2.0)}, "blend is 2.0"),
        ({"kl_budget": 0.0}, "KL budget is 0"),
        ({"kl_budget": math.nan}, "KL budget is nan"),
        ({"max_perplexity_ratio": -1.0}, "perplexity ratio is -1"),
        ({"min_distinct_ratio": 1.5}, r"distinct-2 ratio is 1\.5"),
        ({"tokens": 0}, "tokens per text are 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(fields, message):
    with pytest.raises(OperatorError, match=message):
        _spec(**fields)


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
    result = run("--words", "neverwritten, nor this", "--layers", "1,2")
    assert result.exit_code == 0
    assert "bay: no setting found" in result.stdout
    assert "The recommendation stays: layer 2, strength 0.5, cumulative, blend 0" in result.stdout
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


def _point(hit_rate, strength=0.3):
    return CalibrationPoint(layer=2, rule="cumulative", blend=0.5, strength=strength, texts=2, kl_p95=0.9,
                            hit_rate=hit_rate, perplexity_ratio=1.2, distinct_2=0.8)  # fmt: skip


@pytest.mark.parametrize(
    ("before", "now", "words", "more", "kept"),
    [
        (0.9, 0.5, "bay", (), True),
        (0.9, None, "bay", (), True),
        (0.9, None, "other", (), True),
        (0.9, 0.5, "bay", ("--replace",), False),
        (0.5, 0.5, "bay", (), False),
        (0.5, 0.9, "bay", (), False),
        (0.9, 0.5, "other", (), False),
        (0.9, 0.5, "bay", ("--kl-budget", "2"), False),
        (None, 0.5, "bay", (), False),
    ],
)
def test_a_better_recommendation_is_replaced_only_on_request(shelf, monkeypatch, before, now, words, more, kept):
    directory, run = shelf
    found = before

    def search_settings(_operators, _loaded, spec, **_):
        points = (_point(found or 0.0, 0.3 if found == before else 0.4),)
        return Calibration(words=spec.words, kl_budget=spec.kl_budget, max_perplexity_ratio=2.0,
                           min_distinct_ratio=0.75, prompts=len(spec.prompts), tokens=spec.tokens, plain_hit_rate=0.0,
                           plain_perplexity=5.0, plain_distinct_2=0.9, points=points,
                           chosen=None if found is None else 0)  # fmt: skip

    monkeypatch.setattr("operators.tune.calibrate.search_settings", search_settings)
    assert run("--words", "bay", "--layers", "2").exit_code == 0
    first = Store(directory).load("bay")
    found = now
    result = run("--words", words, "--layers", "2", *more, "--json")
    answer = json.loads(result.stdout)
    assert answer["kept"] is kept
    assert (Store(directory).load("bay").digest == first.digest) is kept or before == now
    assert (answer["previous"] or {}).get("hit_rate") == before
    assert (answer["new"] or {}).get("hit_rate") == now
    if before is not None and not kept:
        assert "replaced: layer 2" in run("--words", words, "--layers", "2", *more).stdout


def test_a_person_sees_both_settings_where_the_better_one_is_kept(shelf, monkeypatch):
    _, run = shelf
    rates = iter((0.9, 0.5))

    def search_settings(_operators, _loaded, spec, **_):
        return Calibration(words=spec.words, kl_budget=1.0, max_perplexity_ratio=2.0, min_distinct_ratio=0.75,
                           prompts=2, tokens=3, plain_hit_rate=0.0, plain_perplexity=5.0, plain_distinct_2=0.9,
                           points=(_point(next(rates)),), chosen=0)  # fmt: skip

    monkeypatch.setattr("operators.tune.calibrate.search_settings", search_settings)
    run("--words", "bay", "--layers", "2")
    lines = run("--words", "bay", "--layers", "2").stdout.splitlines()
    assert "50% hits" in lines[0]
    assert "not stored" in lines[0]
    assert lines[-1].startswith("kept, because it is better: layer 2")
    assert "90% hits" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "operator 'bay' has no words that show its concept; give some: --words"),
        (("--words", "a,,b"), "word '' is blank"),
        (("--words", "a", "--layers", "1,x"), "layers are '1,x'; whole numbers"),
        (("--words", "a", "--kl-budget", "0"), "KL budget is 0"),
        (("--words", "a", "--prompts", "nowhere"), "prompts nowhere: cannot be read"),
        (("--words", "a", "--plot", "c.txt"), "its ending is '.txt'; accepted"),
        (("--words", "a", "--plot", "nowhere/c.png"), "there is no directory"),
    ],
)
def test_bad_input_is_named_before_the_model_is_loaded(shelf, monkeypatch, arguments, message):
    monkeypatch.setattr(models, "load_model", lambda *_args, **_kwargs: pytest.fail("the model was loaded"))
    result = shelf[1](*arguments)
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.model
def test_a_calibrated_operator_speaks_of_its_concept(smollm):
    loaded = smollm()
    concept = concept_from_text("San Francisco is famous for the Golden Gate Bridge", loaded)
    operator = build_operator(BuildSpec((concept,), layer=21, rank=32), loaded)
    prompts = calibration_prompts()[:4]
    spec = CalibrationSpec(
        ("golden gate", "bridge", "san francisco"), prompts, rules=("cumulative",), blends=(0.5,), tokens=16
    )
    found = search_settings({21: operator}, loaded, spec)
    best = found.points[found.chosen]
    assert best.hit_rate >= 0.5 > found.plain_hit_rate
    assert best.kl_p95 <= 1.0
    assert best.perplexity_ratio <= 2.0
