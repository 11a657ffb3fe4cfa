import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from operators.core.errors import UnsupportedModelError
from operators.maps.detach import detached, family_of
from operators.maps.detach.rules import FrozenGate, FrozenSlope, Tape, frozen_eager, frozen_sdpa, mix, with_weights
from operators.maps.jacobian import relative_error

SWIGLU = ["llama", "qwen2", "qwen3", "gemma3", "mistral", "olmo2"]
# transformers' own norms round to float32 on the way, also in a float64 model.
VALUE_TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 2e-2}
IDS = torch.tensor([[5, 17, 101, 230, 64, 7]])


def _input_gradient(model, ids):
    x = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    hidden = model.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state
    (gradient,) = torch.autograd.grad(hidden[0, -1].sum(), x)
    return gradient


def _state(model):
    """Everything that ``detached`` may touch."""
    return (
        model.config._attn_implementation,
        [(name, type(module), "forward" in vars(module)) for name, module in model.named_modules()],
        [id(module.act_fn) for module in model.modules() if hasattr(module, "act_fn")],
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_detached_model_computes_the_same_values(tiny, family, attention, dtype):
    model = tiny(family, attention, dtype).model
    plain = model(IDS).logits
    with detached(model):
        frozen = model(IDS).logits
    assert relative_error(frozen, plain) <= VALUE_TOLERANCE[dtype]


def test_detached_model_has_other_gradients_and_gets_its_own_back(tiny, family):
    model = tiny(family).model
    before = _input_gradient(model, IDS)
    with detached(model):
        inside = _input_gradient(model, IDS)
    assert relative_error(inside, before) > 0.1
    assert torch.equal(_input_gradient(model, IDS), before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_leaving_the_block_restores_every_module(tiny, family, attention):
    model = tiny(family, attention).model
    before = _state(model)
    with detached(model):
        assert _state(model) != before
        assert model.config._attn_implementation == f"detached_{attention}"
    assert _state(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_block_restores_every_module_and_passes_through(tiny, error):
    model = tiny("gemma3").model
    before = _state(model)
    with pytest.raises(error), detached(model):
        raise error
    assert _state(model) == before


def test_a_failure_half_way_into_the_block_restores_every_module(tiny, monkeypatch):
    model = tiny("llama", fresh=True).model
    before = _state(model)
    own = model.set_attn_implementation

    def refuse_first(implementation):
        if implementation.startswith("detached"):
            raise RuntimeError("no such attention")
        own(implementation)

    monkeypatch.setattr(model, "set_attn_implementation", refuse_first)
    with pytest.raises(RuntimeError, match="no such attention"), detached(model):
        pass
    monkeypatch.undo()
    assert _state(model) == before


def _with_unknown_module(model):
    model.model.layers[1].extra = nn.Tanh()


def _with_unknown_norm(model):
    model.model.norm = nn.LayerNorm(40, dtype=torch.float64)


def _in_training(model):
    model.train()


def _with_flash_attention(model):
    model.config._attn_implementation_internal = "flash_attention_2"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_with_unknown_module, r"'model\.layers\.1\.extra' of class Tanh .*'llama'"),
        (_with_unknown_norm, r"'model\.norm' of class LayerNorm"),
        (_in_training, "training mode; dropout is no linear map"),
        (_with_flash_attention, r"'flash_attention_2' cannot be detached.*'eager', 'sdpa'"),
    ],
)
def test_a_model_that_no_table_covers_is_refused_by_name_and_left_alone(tiny, change, named):
    model = tiny("llama", fresh=True).model
    change(model)
    before = _state(model)
    with pytest.raises(UnsupportedModelError, match=named), detached(model):
        pytest.fail("the block was entered")
    assert _state(model) == before


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    model = OPTForCausalLM(
        OPTConfig(vocab_size=20, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2)
    )
    words = r"OPTForCausalLM has no detach table.*GPT2LMHeadModel, .*Gemma3ForCausalLM.*docs/ARCHITECTURES\.md"
    with pytest.raises(UnsupportedModelError, match=words):
        family_of(model)


def test_a_subclass_is_not_taken_for_its_parent():
    class Llama(LlamaForCausalLM):
        pass

    model = Llama(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UnsupportedModelError, match="Llama has no detach table"):
        family_of(model)


def test_a_block_inside_a_block_is_refused_and_the_outer_one_still_ends_well(tiny):
    model = tiny("qwen3").model
    before = _state(model)
    with detached(model), pytest.raises(UnsupportedModelError, match="'detached_sdpa'"), detached(model):
        pass
    assert _state(model) == before


# Each rule on one module, against the derivative written down by hand.


@pytest.mark.parametrize("family", SWIGLU)
def test_norm_derivative_is_the_weight_times_the_frozen_scale(tiny, family):
    loaded = tiny(family)
    norm = loaded.model.model.norm
    x = torch.randn(loaded.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    eps = norm.eps if family == "gemma3" else norm.variance_epsilon
    weight = norm.weight + 1 if family == "gemma3" else norm.weight
    expected = torch.diag(weight / torch.sqrt(x.pow(2).mean() + eps))
    with detached(loaded.model):
        found = torch.autograd.functional.jacobian(norm, x)
    assert relative_error(found, expected) <= 1e-14


@pytest.mark.parametrize("family", SWIGLU)
def test_gate_derivative_is_down_times_the_frozen_gate_times_up(tiny, family):
    loaded = tiny(family)
    mlp = loaded.model.model.layers[1].mlp
    x = torch.randn(loaded.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gate = mlp.act_fn(mlp.gate_proj(x))
    expected = mlp.down_proj.weight @ torch.diag(gate) @ mlp.up_proj.weight
    with detached(loaded.model):
        found = torch.autograd.functional.jacobian(mlp, x)
    assert relative_error(found, expected) <= 1e-14


@pytest.mark.parametrize("rule", [frozen_sdpa, frozen_eager])
def test_attention_derivative_is_the_frozen_weights_on_the_values_and_nothing_on_queries_or_keys(tiny, rule):
    attention = copy.copy(tiny("llama").model.model.layers[0].self_attn)
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 4, 5, 10, dtype=torch.float64, generator=generator).requires_grad_(True)
    key, value = (
        torch.randn(1, 2, 5, 10, dtype=torch.float64, generator=generator).requires_grad_(True) for _ in range(2)
    )
    mask = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    # The head-grouping and the softmax, written out.
    scores = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) / 10**0.5 + mask
    weights = scores.softmax(-1).detach()

    def attend(q, k, v):
        return rule(attention, q, k, v, mask, dropout=0.0, scaling=10**-0.5)[0].transpose(1, 2)

    def expected(v):
        return weights @ v.repeat_interleave(2, dim=1)

    # Eager attention takes its softmax in float32, so that the weights themselves are good to 1e-7.
    with torch.no_grad():
        assert relative_error(attend(query, key, value), expected(value)) <= 1e-6
    found = torch.autograd.functional.jacobian(attend, (query, key, value))
    assert not found[0].any()
    assert not found[1].any()
    by_hand = torch.autograd.functional.jacobian(expected, value)
    assert relative_error(found[2], by_hand) <= (1e-14 if rule is frozen_sdpa else 1e-6)


def test_a_frozen_gate_has_the_value_of_the_activation_and_no_gradient():
    activation = FrozenGate(nn.SiLU(), nn.Identity(), Tape("live", {}))
    gate = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.equal(activation(gate), nn.functional.silu(gate))
    assert not activation(gate).requires_grad


def test_a_frozen_slope_has_the_value_of_the_activation_and_the_gradient_of_its_ratio_also_at_zero():
    activation = FrozenSlope(nn.GELU(), nn.Identity(), Tape("live", {}))
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    assert relative_error(activation(x), nn.functional.gelu(x)) <= 1e-14
    (slope,) = torch.autograd.grad(activation(x).sum(), x)
    expected = 0.5 * (1 + torch.erf(x / 2**0.5))
    assert relative_error(slope, expected) <= 1e-14
    assert slope[3] == pytest.approx(0.5)


def test_layer_norm_keeps_its_mean_live_and_freezes_its_scale(tiny):
    loaded = tiny("gpt2")
    norm = loaded.model.transformer.ln_f
    x = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    centring = torch.eye(40, dtype=torch.float64) - 1 / 40
    expected = torch.diag(norm.weight) @ centring / torch.sqrt(x.var(correction=0) + norm.eps)
    with detached(loaded.model):
        found = torch.autograd.functional.jacobian(norm, x)
    assert relative_error(found, expected) <= 1e-13


@pytest.mark.parametrize("rule", [frozen_sdpa, frozen_eager])
def test_attention_applied_to_the_identity_shows_its_weights(tiny, rule):
    attention = tiny("llama").model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(6)
    query = torch.randn(1, 4, 5, 10, dtype=torch.float64, generator=generator)
    key, value = (torch.randn(1, 2, 5, 10, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    output, weights = with_weights(rule)(attention, query, key, value, mask, dropout=0.0, scaling=0.3)
    assert weights.shape == (1, 4, 5, 5)
    assert not weights.triu(1).any()
    mixed = mix(weights[0], value.transpose(1, 2))
    assert relative_error(mixed, output.flatten(2)) <= 1e-14


def test_eager_soft_capping_stays_in_the_values(tiny):
    attention = tiny("gemma3", "eager").model.model.layers[1].self_attn
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(1, heads, 3, 10, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]
    capped, _ = frozen_eager(attention, *tensors, None, dropout=0.0, scaling=3.0, softcap=0.5)
    free, _ = frozen_eager(attention, *tensors, None, dropout=0.0, scaling=3.0)
    assert relative_error(capped, free) > 0.01


def test_every_table_has_a_tiny_model_that_the_tests_run_on(family, tiny):
    assert family_of(tiny(family).model).name == family
