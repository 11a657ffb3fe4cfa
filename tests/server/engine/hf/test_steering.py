import copy

import pytest
import torch
from transformers import DynamicCache

from operators.core.apply import Setting
from operators.core.artifact import make_artifact
from operators.core.hooks import PushHooks
from operators.model.loading import decoder_layers, embed
from steer_server.engine.hf import decode as decode_module
from steer_server.engine.hf.operator_cache import PreparedOperatorCache
from steer_server.engine.hf.steering import RowSteering, load_pushes, record_doses
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import (
    Application,
    Row,
    SteeringPlan,
)

_LAYER = 2
_PROMPT = "the golden bridge in the bay"


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
        tensor.double() for tensor in (artifact.jacobian(), artifact.substitute_base, artifact.anchor)
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


def test_a_hook_that_never_fires_is_an_error(llama, artifact, plan_of, monkeypatch, decode):
    monkeypatch.setattr(decode_module, "decoder_layers", lambda model: copy.deepcopy(decoder_layers(model)))
    with pytest.raises(SteeringNotAppliedError, match=f"layer {_LAYER} was not reached"):
        decode(llama, plan_of((artifact, 0.5)))


def test_a_hook_that_stops_firing_half_way_is_an_error(llama, artifact, plan_of, make_decoder):
    decoder = make_decoder(llama, [Row(plan_of((artifact, 0.5)))])
    events = decoder.run()
    next(events)
    # When the pass begins, its hooks are there.
    loss = llama.model.register_forward_pre_hook(
        lambda module, args: decoder_layers(module)[_LAYER]._forward_pre_hooks.clear()
    )
    with loss, pytest.raises(SteeringNotAppliedError, match="was not reached"):
        list(events)


def test_a_layer_that_is_called_twice_is_an_error(llama, artifact, plan_of, decode):
    block = decoder_layers(llama.model)[_LAYER]
    again = block.register_forward_hook(lambda module, args, output: again.remove() or module(*args))
    with pytest.raises(SteeringNotAppliedError, match=f"layer {_LAYER} was reached twice"):
        decode(llama, plan_of((artifact, 0.5)))
    again.remove()


def test_strengths_that_cancel_are_an_error(llama, artifact, plan_of, decode):
    with pytest.raises(SteeringNotAppliedError, match="may cancel"):
        decode(llama, plan_of((artifact, 0.5), (artifact, -0.5)))


@pytest.mark.parametrize("strength", [1e30, -1e30, 1e38, 1e300, -1.7e308])
def test_a_strength_that_breaks_the_numbers_is_an_error_and_no_text(llama, artifact, plan_of, strength, decode):
    with pytest.raises(SteeringNotAppliedError):
        decode(llama, plan_of((artifact, strength)))
    assert _hooks_left(llama) == 0


def test_a_direction_that_does_not_exist_is_an_error(llama, artifact, plan_of, decode):
    zero = torch.zeros_like
    dead = make_artifact(
        artifact.header,
        zero(artifact.factors),
        artifact.anchor,
        zero(artifact.substitute_base),
        neutral=artifact.neutral,
    )
    with pytest.raises(SteeringNotAppliedError, match="position 0 has norm 0"):
        decode(llama, plan_of((dead, 0.5)))
    nowhere = make_artifact(
        artifact.header, artifact.factors, zero(artifact.anchor), artifact.substitute_base, neutral=artifact.neutral
    )
    with pytest.raises(SteeringNotAppliedError, match="operator-0"):
        decode(llama, plan_of((nowhere, 0.5)))


def test_strength_zero_changes_no_bit(llama, artifact, plan_of, decode):
    plain_ids, (nothing,), plain = decode(llama, None)
    ids, (receipts,), logits = decode(llama, plan_of((artifact, 0.0)))
    assert ids == plain_ids
    assert len(logits) == len(plain)
    assert all(torch.equal(a, b) for a, b in zip(logits, plain, strict=True))
    assert nothing == ()
    (receipt,) = receipts
    assert (receipt.prompt_tokens_steered, receipt.generated_tokens_steered) == (0, 0)
    assert (receipt.mean_dose, receipt.max_dose, receipt.strength) == (0.0, 0.0, 0.0)


def test_steering_one_row_changes_no_bit_of_the_other(llama, artifact, plan_of, decode):
    _, _, calm = decode(llama, None, plan_of((artifact, 0.0)))
    ids, _, stormy = decode(llama, None, plan_of((artifact, 1.5)))
    for a, b in zip(calm, stormy, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a[0], b[0])
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(calm, stormy, strict=True))
    assert ids[0] != ids[1]


def test_steering_changes_the_text(llama, artifact, plan_of, decode):
    assert decode(llama, None)[0] != decode(llama, plan_of((artifact, 1.5)))[0]


def test_the_model_is_left_as_it_was_after_success_and_after_every_error(
    llama, artifact, plan_of, decode, make_decoder
):
    decode(llama, plan_of((artifact, 0.5)))
    assert _hooks_left(llama) == 0
    with pytest.raises(SteeringNotAppliedError):
        decode(llama, plan_of((artifact, 0.5), (artifact, -0.5)))
    assert _hooks_left(llama) == 0
    events = make_decoder(llama, [Row(plan_of((artifact, 0.5)))]).run()
    next(events)
    assert _hooks_left(llama) == 0
    events.close()
    assert _hooks_left(llama) == 0

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(make_decoder(llama, [Row(plan_of((artifact, 0.5)))], check_interruption=fail).run())
    assert _hooks_left(llama) == 0


@pytest.mark.parametrize("strength", [0.5, -0.5, 2.0])
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_receipts_count_every_position_and_measure_half_the_strength(llama, artifact, plan_of, strength, blend, decode):
    decoder_prompt = len(llama.tokenizer(_PROMPT)["input_ids"])
    ids, (receipts,), _ = decode(llama, plan_of((artifact, strength), blend=blend), max_tokens=7)
    (receipt,) = receipts
    assert len(ids[0]) == 7
    assert (receipt.prompt_tokens_steered, receipt.generated_tokens_steered) == (decoder_prompt, 6)
    assert receipt.mean_dose == pytest.approx(abs(strength) / 2, abs=1e-5)
    assert receipt.max_dose == pytest.approx(abs(strength) / 2, abs=1e-5)
    assert (receipt.layer, receipt.digest) == (_LAYER, artifact.digest)
    assert (receipt.strength, receipt.blend) == (strength, blend)


def test_a_text_of_one_token_is_steered_in_its_prompt_only(llama, artifact, plan_of, decode):
    _, ((receipt,),), _ = decode(llama, plan_of((artifact, 0.5)), max_tokens=1)
    assert receipt.prompt_tokens_steered == len(llama.tokenizer(_PROMPT)["input_ids"])
    assert receipt.generated_tokens_steered == 0


@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
def test_the_push_at_every_position_is_that_of_the_equation(llama, artifact, plan_of, rule, blend, decode):
    with _Inputs(llama) as inputs:
        ids, _, _ = decode(llama, plan_of((artifact, 0.7), rule=rule, blend=blend))
    before, after = (torch.cat(steps, dim=1)[0].double() for steps in (inputs.before, inputs.after))
    fed = [*llama.tokenizer(_PROMPT)["input_ids"], *ids[0][:-1]]
    unit = _naive_unit(llama, artifact, Setting(0.7, rule, blend), fed)
    expected = before + 0.35 * before.norm(dim=-1, keepdim=True) * unit
    assert after.shape == expected.shape
    assert float((after - expected).norm() / expected.norm()) < 1e-5


def test_two_operators_at_one_layer_add_up(llama, artifact, other_artifact, plan_of, decode):
    with _Inputs(llama) as inputs:
        ids, (receipts,), _ = decode(llama, plan_of((artifact, 0.7), (other_artifact, -0.4)))
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


def test_operators_at_two_layers_are_measured_apart(llama, artifact, remake, plan_of, decode):
    higher = remake(artifact, layer=3, injection_layer=3)
    _, ((first, second),), _ = decode(llama, plan_of((artifact, 0.5), (higher, 1.0)))
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
    shape, d = artifact.factors.shape, artifact.header.hidden_size

    def quarters(*size):
        return torch.randint(-8, 9, size, generator=generator).float() / 4

    return loaded, make_artifact(artifact.header, quarters(*shape), quarters(d), quarters(d), neutral=quarters(d))


@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
@pytest.mark.parametrize("prefill", [1, 3, 7])
def test_a_cached_step_at_a_time_equals_recomputing_everything(exact, rule, prefill, make_decoder):
    loaded, artifact = exact
    plan = SteeringPlan((Application("g", artifact, Setting(0.8, rule, 0.3), ()),))
    ids = torch.tensor(loaded.tokenizer(_PROMPT + " is orange and wide")["input_ids"])[None]
    length = ids.shape[1]
    assert length > 2 * artifact.positions

    def run(cuts, cache):
        prepared = PreparedOperatorCache(loaded.device, budget=1 << 30)
        steering = RowSteering(plan, prepared, torch.float64, prompt_tokens=prefill)
        hidden = []
        with torch.inference_mode(), PushHooks(decoder_layers(loaded.model), steering.layers) as hooks:
            for start, end in cuts:
                x = embed(loaded.model, ids[:, start:end])
                load_pushes(hooks, {0: steering}, {0: x[0]})
                output = loaded.model.get_decoder()(inputs_embeds=x, past_key_values=cache, use_cache=cache is not None)
                record_doses(hooks, {0: steering}, end - start, prompt=start == 0)
                hidden.append(output.last_hidden_state)
        return torch.cat(hidden, dim=1)

    whole = run([(0, length)], None)
    steps = [(0, prefill), *((place, place + 1) for place in range(prefill, length))]
    cached = run(steps, DynamicCache(config=loaded.model.config))
    assert whole.dtype is torch.float64
    assert float((cached - whole).abs().max()) < 1e-10
