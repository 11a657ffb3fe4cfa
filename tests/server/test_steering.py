import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from operators.apply import Setting
from operators.artifact import make_artifact
from operators.models import decoder_layers, embed
from steer_server.engine import decode as decode_module
from steer_server.engine.decode import Decoder
from steer_server.engine.steering import RowSteering, SteeringHooks, prepare_all
from steer_server.errors import EngineFailedError, SteeringNotAppliedError
from steer_server.generate import Gatherer
from steer_server.types import (
    Application,
    Completion,
    DecodeJob,
    FinishReason,
    Row,
    RowFinished,
    SamplingParams,
    SteeringPlan,
    TokenEvent,
)

_LAYER = 2
_PROMPT = "the golden bridge in the bay"


def _decoder(loaded, rows, *, max_tokens=6, interrupted=lambda: None, **sampling):
    ids = tuple(loaded.tokenizer(_PROMPT)["input_ids"])
    plans = [row.plan for row in rows if row.plan]
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)
    return Decoder(
        loaded=loaded,
        job=DecodeJob(ids, params, tuple(rows)),
        prepared=prepare_all(plans, loaded.device, {}),
        interrupted=interrupted,
        eos_ids=frozenset(),
    )


def _decode(loaded, *plans, **options):
    """The token ids and the receipts of each row, and the logits of every step."""
    logits = []
    handle = loaded.model.register_forward_hook(lambda module, args, output: logits.append(output.logits.clone()))
    try:
        events = list(_decoder(loaded, [Row(plan) for plan in plans], **options).run())
    finally:
        handle.remove()
    ids = [
        [event.token_id for event in events if isinstance(event, TokenEvent) and event.row == row]
        for row in range(len(plans))
    ]
    ends = {event.row: event for event in events if isinstance(event, RowFinished)}
    return ids, [ends[row].receipts for row in range(len(plans))], logits


def _hooks_left(loaded):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in loaded.model.modules())


class _Inputs:
    """``with _Inputs(loaded) as inputs:`` - what leaves the layer before, and what the steered layer works on."""

    def __init__(self, loaded):
        layers = decoder_layers(loaded.model)
        self.before, self.after = [], []
        self._handles = [
            layers[_LAYER - 1].register_forward_hook(
                lambda module, args, output: self.before.append(output[0] if isinstance(output, tuple) else output)
            ),
            layers[_LAYER].input_layernorm.register_forward_pre_hook(lambda module, args: self.after.append(args[0])),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


def _naive_unit(loaded, artifact, setting, ids):
    """d_k/|d_k| for each position, term by term in float64, straight from the definition."""
    jacobian, base, anchor = (
        tensor.double() for tensor in (artifact.jacobian, artifact.substitute_base, artifact.anchor)
    )
    x = embed(loaded.model, torch.tensor(ids)).double()
    n = jacobian.shape[0]
    rows = []
    for k in range(len(ids)):
        if setting.rule == "cumulative":
            a = sum(jacobian[j % n] @ x[j] for j in range(k + 1))
        else:
            a = base + jacobian[-1] @ x[k]
        d = (1 - setting.blend) * a / a.norm() + setting.blend * anchor / anchor.norm()
        rows.append(d / d.norm())
    return torch.stack(rows)


def test_the_operators_layer_is_the_one_looked_at_here(artifact, other_artifact):
    assert artifact.header.injection_layer == other_artifact.header.injection_layer == _LAYER


def test_a_hook_that_never_fires_is_an_error(llama, artifact, plan_of, monkeypatch):
    monkeypatch.setattr(decode_module, "decoder_layers", lambda model: copy.deepcopy(decoder_layers(model)))
    with pytest.raises(SteeringNotAppliedError, match=f"layer {_LAYER} was not reached"):
        _decode(llama, plan_of((artifact, 0.5)))


def test_a_hook_that_stops_firing_half_way_is_an_error(llama, artifact, plan_of):
    decoder = _decoder(llama, [Row(plan_of((artifact, 0.5)))])
    events = decoder.run()
    next(events)
    decoder_layers(llama.model)[_LAYER]._forward_pre_hooks.clear()
    with pytest.raises(SteeringNotAppliedError, match="was not reached"):
        list(events)


def test_strengths_that_cancel_are_an_error(llama, artifact, plan_of):
    with pytest.raises(SteeringNotAppliedError, match="may cancel"):
        _decode(llama, plan_of((artifact, 0.5), (artifact, -0.5)))


def test_a_strength_that_is_lost_in_rounding_is_an_error(tiny, artifact, plan_of):
    coarse = tiny("llama", dtype="bfloat16")
    with pytest.raises(SteeringNotAppliedError, match="rounding") as caught:
        _decode(coarse, plan_of((artifact, 1e-9)))
    assert "operator-0=1e-09" in str(caught.value)
    ids, _, _ = _decode(coarse, plan_of((artifact, 0.5)))
    assert len(ids[0]) == 6


@pytest.mark.parametrize("strength", [1e30, -1e30, 1e38, 1e300, -1.7e308])
def test_a_strength_that_breaks_the_numbers_is_an_error_and_no_text(llama, artifact, plan_of, strength):
    with pytest.raises(SteeringNotAppliedError):
        _decode(llama, plan_of((artifact, strength)))
    assert _hooks_left(llama) == 0


def test_a_direction_that_does_not_exist_is_an_error(llama, artifact, plan_of):
    zero = torch.zeros_like
    dead = make_artifact(artifact.header, zero(artifact.jacobian), artifact.anchor, zero(artifact.substitute_base))
    with pytest.raises(SteeringNotAppliedError, match="position 0 has norm 0"):
        _decode(llama, plan_of((dead, 0.5)))
    nowhere = make_artifact(artifact.header, artifact.jacobian, zero(artifact.anchor), artifact.substitute_base)
    with pytest.raises(SteeringNotAppliedError, match="operator-0"):
        _decode(llama, plan_of((nowhere, 0.5)))


def test_a_model_whose_own_numbers_are_broken_is_an_engine_failure(tiny):
    broken = tiny("llama", dtype="float32", fresh=True)
    broken.model.get_output_embeddings().weight[0, 0] = math.nan
    with pytest.raises(EngineFailedError, match="not finite"):
        _decode(broken, None)


def test_strength_zero_changes_no_bit(llama, artifact, plan_of):
    plain_ids, (nothing,), plain = _decode(llama, None)
    ids, (receipts,), logits = _decode(llama, plan_of((artifact, 0.0)))
    assert ids == plain_ids
    assert len(logits) == len(plain)
    assert all(torch.equal(a, b) for a, b in zip(logits, plain, strict=True))
    assert nothing == ()
    (receipt,) = receipts
    assert (receipt.prompt_tokens_steered, receipt.generated_tokens_steered) == (0, 0)
    assert (receipt.mean_dose, receipt.max_dose, receipt.strength) == (0.0, 0.0, 0.0)


def test_steering_one_row_changes_no_bit_of_the_other(llama, artifact, plan_of):
    _, _, calm = _decode(llama, None, plan_of((artifact, 0.0)))
    ids, _, stormy = _decode(llama, None, plan_of((artifact, 1.5)))
    for a, b in zip(calm, stormy, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a[0], b[0])
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(calm, stormy, strict=True))
    assert ids[0] != ids[1]


def test_a_row_alone_says_what_it_says_in_company(llama, artifact, other_artifact, plan_of):
    plans = [plan_of((artifact, 0.8)), None, plan_of((other_artifact, 0.8))]
    together, _, _ = _decode(llama, *plans)
    assert together == [_decode(llama, plan)[0][0] for plan in plans]


def test_steering_changes_the_text(llama, artifact, plan_of):
    assert _decode(llama, None)[0] != _decode(llama, plan_of((artifact, 1.5)))[0]


def test_the_model_is_left_as_it_was_after_success_and_after_every_error(llama, artifact, plan_of):
    _decode(llama, plan_of((artifact, 0.5)))
    assert _hooks_left(llama) == 0
    with pytest.raises(SteeringNotAppliedError):
        _decode(llama, plan_of((artifact, 0.5), (artifact, -0.5)))
    assert _hooks_left(llama) == 0
    events = _decoder(llama, [Row(plan_of((artifact, 0.5)))]).run()
    next(events)
    assert _hooks_left(llama) == 1
    events.close()
    assert _hooks_left(llama) == 0

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(_decoder(llama, [Row(plan_of((artifact, 0.5)))], interrupted=fail).run())
    assert _hooks_left(llama) == 0


@pytest.mark.parametrize("strength", [0.5, -0.5, 2.0])
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_receipts_count_every_position_and_measure_half_the_strength(llama, artifact, plan_of, strength, blend):
    decoder_prompt = len(llama.tokenizer(_PROMPT)["input_ids"])
    ids, (receipts,), _ = _decode(llama, plan_of((artifact, strength), blend=blend), max_tokens=7)
    (receipt,) = receipts
    assert len(ids[0]) == 7
    assert (receipt.prompt_tokens_steered, receipt.generated_tokens_steered) == (decoder_prompt, 6)
    assert receipt.mean_dose == pytest.approx(abs(strength) / 2, abs=1e-5)
    assert receipt.max_dose == pytest.approx(abs(strength) / 2, abs=1e-5)
    assert (receipt.layer, receipt.digest) == (_LAYER, artifact.digest)
    assert (receipt.strength, receipt.blend) == (strength, blend)


def test_a_text_of_one_token_is_steered_in_its_prompt_only(llama, artifact, plan_of):
    _, ((receipt,),), _ = _decode(llama, plan_of((artifact, 0.5)), max_tokens=1)
    assert receipt.prompt_tokens_steered == len(llama.tokenizer(_PROMPT)["input_ids"])
    assert receipt.generated_tokens_steered == 0


@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
def test_the_push_at_every_position_is_that_of_the_equation(llama, artifact, plan_of, rule, blend):
    with _Inputs(llama) as inputs:
        ids, _, _ = _decode(llama, plan_of((artifact, 0.7), rule=rule, blend=blend))
    before, after = (torch.cat(steps, dim=1)[0].double() for steps in (inputs.before, inputs.after))
    fed = [*llama.tokenizer(_PROMPT)["input_ids"], *ids[0][:-1]]
    unit = _naive_unit(llama, artifact, Setting(0.7, rule, blend), fed)
    expected = before + 0.35 * before.norm(dim=-1, keepdim=True) * unit
    assert after.shape == expected.shape
    assert float((after - expected).norm() / expected.norm()) < 1e-5


def test_two_operators_at_one_layer_add_up(llama, artifact, other_artifact, plan_of):
    with _Inputs(llama) as inputs:
        ids, (receipts,), _ = _decode(llama, plan_of((artifact, 0.7), (other_artifact, -0.4)))
    before, after = (torch.cat(steps, dim=1)[0].double() for steps in (inputs.before, inputs.after))
    fed = [*llama.tokenizer(_PROMPT)["input_ids"], *ids[0][:-1]]
    push = 0.35 * _naive_unit(llama, artifact, Setting(0.7, "cumulative", 0.0), fed)
    push = push - 0.2 * _naive_unit(llama, other_artifact, Setting(0.4, "cumulative", 0.0), fed)
    expected = before + before.norm(dim=-1, keepdim=True) * push
    assert float((after - expected).norm() / expected.norm()) < 1e-5
    first, second = receipts
    assert (first.operator, second.operator) == ("operator-0", "operator-1")
    # They share a layer, and so they share the measurement: the dose of their sum.
    assert first.mean_dose == second.mean_dose == pytest.approx(float(push.norm(dim=-1).mean()), rel=1e-4)
    assert first.max_dose == second.max_dose == pytest.approx(float(push.norm(dim=-1).max()), rel=1e-4)


def test_operators_at_two_layers_are_measured_apart(llama, artifact, remake, plan_of):
    higher = remake(artifact, layer=3, injection_layer=3)
    _, ((first, second),), _ = _decode(llama, plan_of((artifact, 0.5), (higher, 1.0)))
    assert (first.layer, second.layer) == (2, 3)
    assert first.mean_dose == pytest.approx(0.25, abs=1e-5)
    assert second.mean_dose == pytest.approx(0.5, abs=1e-5)


@pytest.fixture
def exact(tiny, artifact):
    """A float64 model and an operator whose running sums are exact in float32, so that no order of adding matters."""
    loaded = tiny("llama", dtype="float64", fresh=True)
    generator = torch.Generator().manual_seed(0)
    weight = loaded.model.get_input_embeddings().weight
    weight.copy_((weight * 4).round().clamp(-8, 8) / 4)
    shape, d = artifact.jacobian.shape, artifact.header.hidden_size

    def quarters(*size):
        return torch.randint(-8, 9, size, generator=generator).float() / 4

    return loaded, make_artifact(artifact.header, quarters(*shape), quarters(d), quarters(d))


@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
@pytest.mark.parametrize("prefill", [1, 3, 7])
def test_a_cached_step_at_a_time_equals_recomputing_everything(exact, rule, prefill):
    loaded, artifact = exact
    plan = SteeringPlan((Application("g", artifact, Setting(0.8, rule, 0.3), ()),))
    ids = torch.tensor(loaded.tokenizer(_PROMPT + " is orange and wide")["input_ids"])[None]
    length = ids.shape[1]
    assert length > 2 * artifact.positions

    def run(cuts, cache):
        steering = RowSteering(plan, prepare_all([plan], loaded.device, {}))
        hidden = []
        with torch.inference_mode(), SteeringHooks(decoder_layers(loaded.model), steering.layers) as hooks:
            for start, end in cuts:
                x = embed(loaded.model, ids[:, start:end])
                hooks.load([(0, steering)], x)
                output = loaded.model.get_decoder()(inputs_embeds=x, past_key_values=cache, use_cache=cache is not None)
                hooks.collect([(0, steering)], prompt=start == 0)
                hidden.append(output.last_hidden_state)
        return torch.cat(hidden, dim=1)

    whole = run([(0, length)], None)
    steps = [(0, prefill), *((place, place + 1) for place in range(prefill, length))]
    cached = run(steps, DynamicCache(config=loaded.model.config))
    assert whole.dtype is torch.float64
    assert float((cached - whole).abs().max()) < 1e-10


def test_scores_of_a_plain_row_say_that_it_is_plain(llama):
    events = list(_decoder(llama, [Row(None, score=True)], logprobs=0).run())
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert len(tokens) == 6
    for event in tokens:
        assert event.score.kl == pytest.approx(0.0, abs=1e-6)
        assert event.score.plain_logprob == pytest.approx(event.logprob.logprob, abs=1e-5)


def test_scores_are_those_of_the_plain_model_on_the_steered_text(llama, artifact, plan_of):
    plan, rows = plan_of((artifact, 1.0)), []
    handle = llama.model.register_forward_hook(lambda module, args, output: rows.append(output.logits[0, -1].clone()))
    try:
        events = list(_decoder(llama, [Row(plan, score=True)]).run())
    finally:
        handle.remove()
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    ids = [*llama.tokenizer(_PROMPT)["input_ids"], *(event.token_id for event in tokens)]
    with torch.no_grad():
        plain = llama.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    first = len(ids) - len(tokens)
    for place, event in enumerate(tokens):
        p = plain[first + place - 1]
        assert event.score.plain_logprob == pytest.approx(float(p[event.token_id]), abs=1e-3)
        q = rows[place].log_softmax(-1)
        assert event.score.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
        assert event.score.kl > 0


def test_a_row_that_is_interrupted_at_once_has_no_text_and_a_steered_prompt(llama, artifact, plan_of):
    plan = plan_of((artifact, 0.5))
    decoder = _decoder(llama, [Row(plan)], interrupted=lambda: FinishReason.TIME_LIMIT)
    gatherer = Gatherer("r", len(decoder.job.prompt_ids), decoder.job.sampling, plan)
    completion = _completion_of(gatherer, decoder.run())
    assert (completion.text, completion.token_ids) == ("", ())
    assert completion.receipts[0].prompt_tokens_steered == len(decoder.job.prompt_ids)


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.TIME_LIMIT])
def test_an_interrupted_row_ends_with_its_receipts(llama, artifact, plan_of, reason):
    calls = iter([None, None, reason])
    events = list(_decoder(llama, [Row(plan_of((artifact, 0.5)))], interrupted=lambda: next(calls)).run())
    end = events[-1]
    assert end.reason is reason
    assert sum(isinstance(event, TokenEvent) for event in events) == 2
    assert end.receipts[0].generated_tokens_steered == 1


def _completion_of(gatherer, events):
    gathered = [item for event in events for item in gatherer.add(event)]
    return next(item for item in gathered if isinstance(item, Completion))


def test_an_interrupted_row_is_accepted_with_all_of_its_positions(llama, artifact, plan_of):
    plan = plan_of((artifact, 0.5))
    calls = iter([None, None, FinishReason.TIME_LIMIT])
    decoder = _decoder(llama, [Row(plan)], interrupted=lambda: next(calls))
    gatherer = Gatherer("r", len(decoder.job.prompt_ids), decoder.job.sampling, plan)
    completion = _completion_of(gatherer, decoder.run())
    assert completion.reason is FinishReason.TIME_LIMIT
    assert len(completion.token_ids) == 2


@pytest.mark.parametrize("change", ["no receipts", "one position less", "one prompt token less", "another digest"])
def test_an_engine_that_forgets_its_plan_gives_no_text(llama, artifact, plan_of, change):
    plan = plan_of((artifact, 0.5))
    decoder = _decoder(llama, [Row(plan)])
    *tokens, end = decoder.run()
    (receipt,) = end.receipts
    forged = {
        "no receipts": (),
        "one position less": (replace(receipt, generated_tokens_steered=receipt.generated_tokens_steered - 1),),
        "one prompt token less": (replace(receipt, prompt_tokens_steered=receipt.prompt_tokens_steered - 1),),
        "another digest": (replace(receipt, digest="sha256:" + "0" * 64),),
    }[change]
    gatherer = Gatherer("r", len(decoder.job.prompt_ids), decoder.job.sampling, plan)
    with pytest.raises(SteeringNotAppliedError):
        _completion_of(gatherer, [*tokens, replace(end, receipts=forged)])


def test_a_stop_string_ends_one_row_and_leaves_the_others(llama):
    ids, _, _ = _decode(llama, None, max_tokens=8)
    text = llama.tokenizer.decode(ids[0])
    place = next(place for place in range(3, len(text)) if text[place : place + 2].isalpha())
    stop = text[place : place + 2]
    events = list(_decoder(llama, [Row(None), Row(None)], max_tokens=8, stop_strings=(stop,)).run())
    ends = [event for event in events if isinstance(event, RowFinished)]
    assert [end.reason for end in ends] == [FinishReason.STOP_STRING] * 2
    shown = "".join(event.text for event in events if event.row == 0)
    assert shown == text[: text.index(stop)]
