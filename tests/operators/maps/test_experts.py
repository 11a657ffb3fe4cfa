"""Mixtures of experts: the rule on one block, against the sum over its experts written down by hand."""

import pytest
import torch
import torch.nn.functional as F

from operators.core.errors import UnsupportedModelError
from operators.maps.detach import detached, family_of
from operators.maps.jacobian import relative_error
from operators.maps.replay import Replay
from tests.odd_models import odd_model
from tests.operators.maps.exactness import IDS


def _x(model, *shape):
    return torch.randn(
        *shape, model.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )


def _derivative_of_swiglu(block, x, weights, chosen):
    """sum_e w_e down_e diag(silu(gate_e x)) up_e, (d, d), for one token x (d,) and what the router gave it."""
    total = 0
    for weight, expert in zip(weights, chosen, strict=True):
        gate, up = block.experts.gate_up_proj[expert].chunk(2)
        total = total + weight * block.experts.down_proj[expert] @ torch.diag(F.silu(gate @ x)) @ up
    shared = getattr(block, "shared_experts", None)
    if shared is not None:
        gate = F.silu(shared.gate_proj.weight @ x)
        total = total + shared.down_proj.weight @ torch.diag(gate) @ shared.up_proj.weight
    return total


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3"])
def test_the_derivative_is_the_weighted_sum_of_the_chosen_experts_with_their_gates_frozen(name):
    model = odd_model(name)
    block, x = model.model.layers[2].mlp, _x(model, 2)
    with detached(model):
        found = torch.autograd.functional.jacobian(lambda x: block(x[None])[0], x)
    # Of both tokens at once, as the block asks: DeepSeek's router multiplies in float32, and rounds by their number.
    _, weights, chosen = block.gate(x)
    for at in range(2):
        assert relative_error(found[at, :, at], _derivative_of_swiglu(block, x[at], weights[at], chosen[at])) <= 1e-12
    # A token's experts read no other token.
    assert not found[0, :, 1].any()
    assert not found[1, :, 0].any()


def test_the_clamped_gate_of_gpt_oss_is_frozen_with_the_ratio_by_which_up_is_clamped():
    model = odd_model("gpt_oss")
    block, x = model.model.layers[2].mlp, _x(model, 1)
    experts = block.experts
    _, weights, chosen = block.router(x)
    expected, constant, clamped = 0, 0, 0
    for weight, expert in zip(weights[0], chosen[0], strict=True):
        both = x[0] @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=experts.limit), both[1::2]
        glu, ratio = gate * torch.sigmoid(experts.alpha * gate), up.clamp(-experts.limit, experts.limit) / up
        clamped += int((ratio < 1).sum())
        down = weight * experts.down_proj[expert].T
        expected = expected + down @ torch.diag(glu * ratio) @ experts.gate_up_proj[expert][:, 1::2].T
        bias = glu * (ratio * experts.gate_up_proj_bias[expert][1::2] + 1)
        constant = constant + down @ bias + weight * experts.down_proj_bias[expert]
    assert clamped
    with detached(model):
        found = torch.autograd.functional.jacobian(lambda x: block(x[None])[0][0], x)[0, :, 0]
        value = block(x[None])[0][0, 0]
    assert relative_error(found, expected) <= 1e-12
    assert relative_error(found @ x[0] + constant, value) <= 1e-12
    assert relative_error(value, block(x[None])[0][0, 0]) <= 1e-12


@pytest.mark.parametrize(("name", "rounding"), [("mixtral", 1e-12), ("deepseek_v3", 1e-6)])
def test_inputs_of_a_batch_have_experts_of_their_own(name, rounding):
    """DeepSeek's router multiplies in float32, which rounds by the number of rows, and by the processor."""
    model = odd_model(name)
    block, x = model.model.layers[2].mlp, _x(model, 3, 4)
    with detached(model):
        together, alone = block(x), [block(each[None])[0] for each in x]
    assert relative_error(together, torch.stack(alone)) <= rounding
    assert relative_error(together, block(x)) <= rounding


def test_the_experts_of_the_prompt_are_kept_whatever_goes_through_the_map():
    model = odd_model("olmoe")
    replay = Replay(model, IDS, layer=4, profile="residual")
    v = _x(model, 2, len(IDS))
    assert relative_error(replay.jvp(3 * v[:1] - v[1:]), 3 * replay.jvp(v[:1]) - replay.jvp(v[1:])) <= 1e-12
    for layer in model.model.layers:
        # Another router: had it been asked, other experts would have answered.
        layer.mlp.gate.weight.neg_()
    assert torch.equal(replay.jvp(v), replay.jvp(v))
    assert relative_error(replay.reconstruction(), replay.y) <= 1e-12


def test_values_that_would_be_clipped_are_refused_by_the_setting():
    with pytest.raises(
        UnsupportedModelError, match=r"OlmoeForCausalLM: .* has clip_qkv = 0\.5, which the 'olmoe' table"
    ):
        family_of(odd_model("olmoe", clip_qkv=0.5))
