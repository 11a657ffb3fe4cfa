"""Calibration: the curves, the choice among them, and the command."""

import math
import re

import pytest
import torch

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.builder.verify import verify_operator
from operators.core.apply import Setting, prepare
from operators.core.errors import BuildError, IncompatibleOperatorError, OperatorError, StoreError
from operators.core.header import Recommended
from operators.core.measured import Sampling
from operators.tune.accessibility import accessibility
from operators.tune.calibrate import calibrate, calibrate_with_examples
from operators.tune.calibration_spec import CalibrationSpec
from operators.tune.continuations import ContinuationRequest, Injection, decode_continuations
from operators.tune.form import ALL_FORMS, Form, forms_for
from operators.tune.journal import Journal
from operators.tune.metrics import WordList, compute_metrics
from operators.tune.operators_at_layers import OperatorsAtLayers, candidate_layers, layers_to_try, prune_layers
from operators.tune.prompts import calibration_prompts, neutral_prompts
from operators.tune.trial_memory import estimate_trial

PROMPTS = ("The bay", "Here is a painting of the", "My dress")
TEXT = "The bay"
HELD_OUT = ("A golden", "In the bay")
NOWHERE = ("neverwritten",)
GREEDY = Sampling(repetition_penalty=1.0)
BLEND = Form(blend=0.5)


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
            "held_out": HELD_OUT,
            "sampling": GREEDY,
            "kl_budget": 2.0,
            "max_perplexity_ratio": 1e9,
            "min_distinct_ratio": 0,
            "tokens": 5,
            **fields,
        }
    )


def _telling(loaded, operator, layer=2):
    """Words that texts pushed along the anchor hold, and plain ones do not."""
    prompts = [tuple(loaded.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    placed, words = OperatorsAtLayers(operator, loaded).placed(layer), []
    for strengths in ((0.0,), (0.3, 0.4, 0.5, 0.7)):
        pushes = [Injection(placed.operator, layer, Form(blend=1.0).setting(each)) for each in strengths]
        rows = [ContinuationRequest(ids, push if push.setting.strength else None) for push in pushes for ids in prompts]
        texts = decode_continuations(rows, loaded, tokens=5)
        words.append({word for text in texts for word in re.findall(r"[^\W\d_]+", loaded.tokenizer.decode(text.ids))})
    return tuple(sorted(words[1] - words[0]))


def test_the_choice_is_the_best_of_the_curves_and_the_curves_are_what_single_trials_give(tiny, operator):
    loaded = tiny("llama", dtype="float32")
    words = _telling(loaded, operator)
    spec = _spec(words=words, layers=(2,), kl_budget=0.25)
    calibrated = calibrate(operator, loaded, spec)
    found = calibrated.header.calibration
    assert found.chosen is not None
    best = found.points[found.chosen]
    whole = [p for p in found.points if p.texts == len(PROMPTS) and p.kl_p95 <= 0.25]
    assert best.useful_rate == max(point.useful_rate for point in whole)
    recommended = calibrated.header.recommended
    assert Form.of(best) == Form.of(recommended)
    assert (best.strength, best.layer) == (recommended.strength, calibrated.header.layer)
    assert {Form.of(point) for point in found.points} == set(ALL_FORMS)
    rows = [ContinuationRequest(tuple(loaded.tokenizer(prompt)["input_ids"])) for prompt in PROMPTS]
    plain = compute_metrics(decode_continuations(rows, loaded, tokens=5), WordList(words), loaded)
    assert (found.plain_hit_rate, found.plain_distinct_2) == (plain.hit_rate, plain.distinct_2)
    at_best = Injection(prepare(calibrated, loaded.device), best.layer, Setting.of(recommended))
    alone = [decode_continuations([ContinuationRequest(row.ids, at_best)], loaded, tokens=5)[0] for row in rows]
    again = compute_metrics(alone, WordList(words), loaded)
    assert (again.useful_rate, again.hit_rate, again.distinct_2) == (best.useful_rate, best.hit_rate, best.distinct_2)
    assert again.kl_p95 == pytest.approx(best.kl_p95, rel=1e-3)
    assert again.kl_mean == pytest.approx(best.kl_mean, rel=1e-3)
    assert again.perplexity / plain.perplexity == pytest.approx(best.perplexity_ratio, rel=1e-3)
    assert (found.sampling, found.held_out.prompts) == (GREEDY, len(HELD_OUT))
    assert found.held_out.useful_low <= found.held_out.useful_rate <= found.held_out.useful_high


def test_the_figure_is_measured_on_prompts_that_the_search_never_saw(tiny, operator):
    loaded = tiny("llama", dtype="float32")
    words = _telling(loaded, operator)
    result = calibrate_with_examples(operator, loaded, _spec(words=words, layers=(2,), kl_budget=0.25))
    header = result.artifact.header
    push = Injection(prepare(result.artifact, loaded.device), 2, Setting.of(header.recommended))
    ids = [tuple(loaded.tokenizer(prompt)["input_ids"]) for prompt in HELD_OUT]
    texts = decode_continuations([ContinuationRequest(each, push) for each in ids], loaded, tokens=5)
    assert header.calibration.held_out.hit_rate == compute_metrics(texts, WordList(words), loaded).hit_rate
    assert [example.prompt for example in result.examples] == list(HELD_OUT)
    assert [example.steered for example in result.examples] == [loaded.tokenizer.decode(text.ids) for text in texts]
    with pytest.raises(OperatorError, match="is held out and searched with"):
        _spec(held_out=(*HELD_OUT, PROMPTS[0]))


def test_the_contrast_and_the_map_of_what_has_none_are_not_tried(make_operator, make_rank_0):
    old = forms_for(make_operator().header, ALL_FORMS)
    assert {form.anchor for form in old} == {"concept"}
    assert len(old) == len(set(old)) < len(ALL_FORMS)
    vector = forms_for(make_rank_0().header, ALL_FORMS)
    assert {(form.blend, form.anchor, str(form.positions)) for form in vector} == {
        (1.0, "concept", positions) for positions in ("all", "first", "1..")
    }
    assert forms_for(make_operator(neutral=True).header, ALL_FORMS) == ALL_FORMS


def test_layers_come_first_by_their_anchors_alone_and_one_map_is_built(tiny, operator, monkeypatch):
    loaded, built = tiny("llama", dtype="float32"), []
    monkeypatch.setattr(
        "operators.tune.operators_at_layers.build_operator",
        lambda spec, *args, **more: built.append(spec.layer) or build_operator(spec, *args, **more),
    )
    found = calibrate(operator, loaded, _spec(words=_telling(loaded, operator), layers=(1, 2, 3)))
    points = found.header.calibration.points
    assert {p.layer for p in points if p.blend == 1.0} == {1, 2, 3}
    (layer,) = {p.layer for p in points if p.blend < 1.0}
    assert built == ([layer] if layer != 2 else [])


def test_the_anchors_of_another_layer_are_those_of_the_operator_that_is_built_there(tiny, operator):
    loaded = tiny("llama", dtype="float32")
    operators = OperatorsAtLayers(operator, loaded)
    for layer in (1, 2, 3):
        alone, whole = operators.anchors(layer), operators.placed(layer)
        assert alone.injection_layer == whole.injection_layer == layer
        for name in ("unit_anchor", "unit_contrast"):
            torch.testing.assert_close(getattr(alone.operator, name), getattr(whole.operator, name), rtol=0, atol=1e-4)


def test_layers_that_are_not_given_are_pruned_by_what_their_anchor_says(tiny, operator, monkeypatch):
    loaded = tiny("llama", dtype="float32")
    scores = iter((0.1, 5.0, 3.0))
    monkeypatch.setattr("operators.tune.operators_at_layers.accessibility", lambda *_: next(scores))
    assert layers_to_try(operator, loaded, _spec(quick=True)) == (2, 3)
    assert layers_to_try(operator, loaded, _spec(layers=(1, 2, 3), quick=True)) == (1, 2, 3)
    scores = {9: 3.3, 12: 3.1, 15: 3.2, 20: 1.8, 21: 2.4, 24: 2.0}
    assert prune_layers(20, scores, 2) == (20, 21)
    assert prune_layers(20, scores, 3) == (9, 20, 21)
    assert prune_layers(24, scores, 3) == (9, 15, 24)


def test_accessibility_is_high_where_the_anchor_says_the_word(tiny):
    loaded = tiny("llama", dtype="float32")
    rows = loaded.model.get_output_embeddings().weight
    (token,) = loaded.tokenizer("G", add_special_tokens=False)["input_ids"]
    towards = accessibility(rows[token].detach(), ("G",), loaded, "golden")
    away = accessibility(-rows[token].detach(), ("G",), loaded, "golden")
    assert towards > 2 > away


def test_what_was_measured_before_an_interrupt_is_not_measured_again(tiny, operator, tmp_path, monkeypatch):
    loaded, path = tiny("llama", dtype="float32"), tmp_path / ".calibrate-bay.jsonl"
    spec = _spec(words=_telling(loaded, operator), layers=(2,))
    whole = calibrate(operator, loaded, spec).header.calibration
    decoded = []

    def decode(rows, *args, **more):
        decoded.append(len(rows))
        if len(decoded) == 4:
            raise KeyboardInterrupt
        return decode_continuations(rows, *args, **more)

    monkeypatch.setattr("operators.tune.candidates.decode_continuations", decode)
    with pytest.raises(KeyboardInterrupt):
        calibrate_with_examples(operator, loaded, spec, journal=Journal(path, "key"))
    before = path.read_text().splitlines()
    # As a process that was killed while it wrote leaves it.
    path.write_text("\n".join([*before, before[-1][:40]]))
    journal = Journal(path, "key")
    assert journal.resumed == len(before) - 1 > 0
    again = calibrate_with_examples(operator, loaded, spec, journal=journal).artifact.header.calibration
    assert again == whole
    assert Journal(path, "another").resumed == 0
    journal.delete()
    assert not path.exists()


def test_a_journal_that_is_no_file_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="cannot be written"):
        Journal(tmp_path / "link", "key")
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_the_operator_is_built_again_at_the_chosen_layer_and_keeps_everything_else(tiny, operator):
    loaded = tiny("llama", dtype="float32")
    spec = _spec(words=_telling(loaded, operator, layer=1), layers=(1,), kl_budget=0.25)
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
    spec = _spec(words=_telling(loaded, operator), forms=(BLEND,), layers=(2,), kl_budget=50.0, **bound)
    found = calibrate(operator, loaded, spec).header.calibration
    if "max_perplexity_ratio" in bound:
        assert found.chosen is None
    assert found.chosen is None or spec.admits(found.points[found.chosen], found.plain_distinct_2)


def test_fewer_candidates_go_on_to_more_prompts_and_the_progress_ends_at_its_total(tiny, operator):
    loaded, told = tiny("llama", dtype="float32"), []
    prompts = tuple(f"The bay {k}" for k in range(14))
    found = calibrate(
        operator, loaded, _spec(prompts=prompts, tokens=2, layers=(2,)), progress=lambda *now: told.append(now)
    ).header.calibration
    counts = {size: len({Form.of(p) for p in found.points if p.texts == size}) for size in (6, 12, 14)}
    assert counts == {6: len(ALL_FORMS), 12: 4, 14: 2}
    told = [each for each in told if each[0] == "tokens of texts"]
    dones, totals = [done for _, done, _ in told], {total for _, _, total in told}
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
    spec = _spec(forms=(BLEND,), layers=(2,))
    plenty = calibrate(operator, loaded, spec).header.calibration
    longest = max(len(loaded.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS + HELD_OUT) + 5
    need, sizes = estimate_trial(loaded, longest), []
    monkeypatch.setattr(
        "operators.tune.candidates.decode_continuations",
        lambda rows, *args, texts_per_batch, **more: (
            sizes.append(texts_per_batch) or decode_continuations(rows, *args, texts_per_batch=texts_per_batch, **more)
        ),
    )
    little = calibrate(operator, loaded, spec, max_memory=operator.nbytes + 2 * need.per_row).header.calibration
    assert set(sizes) == {2}
    assert [point.kl_p95 for point in little.points] == pytest.approx(
        [point.kl_p95 for point in plenty.points], rel=1e-3
    )
    with pytest.raises(BuildError, match=rf"a text of {longest} tokens of tiny-llama.* needs about .* 9 bytes may be"):
        calibrate(operator, loaded, spec, max_memory=operator.nbytes + 9)


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
        ({"forms": ()}, "no forms"),
        ({"held_out": ()}, "no held-out prompts"),
        ({"forms": (Form(rule="average"),)}, "rule is 'average'"),
        ({"forms": (Form(blend=2.0),)}, "blend is 2.0"),
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


@pytest.mark.model
def test_a_calibrated_operator_speaks_of_its_concept(smollm):
    loaded = smollm()
    concept = concept_from_text("San Francisco is famous for the Golden Gate Bridge", loaded)
    operator = build_operator(BuildSpec((concept,), layer=21, rank=32), loaded)
    spec = CalibrationSpec(
        ("golden gate", "bridge", "san francisco"),
        calibration_prompts()[:4],
        held_out=neutral_prompts()[:4],
        layers=(21,),
        forms=(Form(blend=0.5),),
        tokens=16,
    )
    found = calibrate(operator, loaded, spec).header.calibration
    best = found.points[found.chosen]
    assert best.useful_rate >= 0.5 > found.plain_hit_rate
    assert best.kl_p95 <= 1.0
    assert best.perplexity_ratio <= 2.0
