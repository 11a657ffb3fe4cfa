import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from operators.core.errors import UnsupportedModelError
from operators.maps.detach import detached
from operators.maps.jacobian import detached_jacobian, exact_jacobian, ordinary_jacobian, relative_error
from operators.maps.replay import Replay, target_hidden_state
from operators.model.loading import embed

# Where the embeddings are what the first block receives, so that they can be fed in again.
WITHOUT_POSITIONS = [*("llama", "qwen2", "qwen3", "mistral", "ministral", "olmo2", "gemma3", "phi3", "qwen3_moe")]
ATTENTIONS = ["sdpa", "eager"]
PROFILES = ["golden", "residual"]
# Longer than the sliding window of the tiny Gemma.
IDS = (277, 12, 290, 65, 278, 69, 317)


def _layer(loaded, which):
    return {"first": 1, "middle": loaded.num_layers // 2, "last": loaded.num_layers}[which]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("which", ["first", "middle", "last"])
def test_the_sum_of_jacobian_times_embeddings_is_the_hidden_state(tiny, family, which, profile, attention):
    loaded = tiny(family, attention)
    found = detached_jacobian(loaded.model, IDS, layer=_layer(loaded, which), profile=profile)
    assert found.jacobian.shape == (len(IDS), loaded.hidden_size, loaded.hidden_size)
    assert found.reconstruction_error <= 1e-12


def test_the_ordinary_jacobian_does_not_give_the_hidden_state_back(tiny, family):
    loaded = tiny(family)
    assert ordinary_jacobian(loaded.model, IDS, layer=2, profile="residual").reconstruction_error > 0.1


def _outputs(model, ids):
    """h^(0..L) and the final norm's output at the last position, from the model's own plain forward pass."""
    with torch.no_grad():
        output = model.get_decoder()(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return [state[0, -1] for state in output.hidden_states], output.last_hidden_state[0, -1]


@pytest.mark.parametrize("family", WITHOUT_POSITIONS)
def test_the_target_is_the_models_own_hidden_state(tiny, family):
    model = tiny(family).model
    states, final = _outputs(model, IDS)
    x = embed(model, torch.tensor([IDS]))
    for layer in range(1, len(states) - 1):
        with torch.no_grad():
            residual = target_hidden_state(model, x, layer=layer, profile="residual")[0]
            golden = target_hidden_state(model, x, layer=layer, profile="golden")[0]
        assert relative_error(residual, states[layer]) <= 1e-12
        assert relative_error(golden, model.get_decoder().norm(states[layer])) <= 1e-12
    with torch.no_grad():
        last = target_hidden_state(model, x, layer=len(states) - 1, profile="golden")[0]
    assert relative_error(last, final) <= 1e-12


def test_stopping_at_a_layer_or_failing_on_the_way_leaves_no_hook_behind(tiny):
    model = tiny("llama").model
    x = embed(model, torch.tensor([IDS]))
    target_hidden_state(model, x, layer=2, profile="golden")
    with pytest.raises(RuntimeError, match="size of tensor"):
        target_hidden_state(model, x[:, :, :3], layer=4, profile="golden")
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", WITHOUT_POSITIONS)
def test_the_jacobian_is_what_autograd_finds_row_by_row(tiny, family, profile, attention):
    loaded = tiny(family, attention)
    found = detached_jacobian(loaded.model, IDS, layer=2, profile=profile)
    with detached(loaded.model):
        expected = torch.autograd.functional.jacobian(
            lambda x: target_hidden_state(loaded.model, x[None], layer=2, profile=profile)[0], found.x
        )
    assert relative_error(found.jacobian, expected.transpose(0, 1)) <= 1e-13


def _frozen_replay(model, ids, layer):
    """A Llama written out: records every gain at ``ids``, and returns x -> h with those gains as constants."""
    gains = []
    n = len(ids)
    x = embed(model, torch.tensor([ids]))[0]
    cos, sin = model.model.rotary_emb(x[None], torch.arange(n)[None])
    mask = torch.full((n, n), float("-inf"), dtype=x.dtype).triu(1)

    def scale(norm, h):
        return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)

    def heads(h):
        return h.view(n, -1, 10).transpose(0, 1)

    def block(number, h, gain):
        own = model.model.layers[number]
        attention, mlp = own.self_attn, own.mlp
        if gain is None:
            normed = h * scale(own.input_layernorm, h) * own.input_layernorm.weight
            q, k = apply_rotary_pos_emb(heads(attention.q_proj(normed)), heads(attention.k_proj(normed)), cos, sin)
            scores = q[0] @ k[0].repeat_interleave(2, dim=0).transpose(-1, -2) / 10**0.5 + mask
            gain = {"norm": scale(own.input_layernorm, h), "weights": scores.softmax(-1)}
        values = heads(attention.v_proj(h * gain["norm"] * own.input_layernorm.weight))
        mixed = gain["weights"] @ values.repeat_interleave(2, dim=0)
        h = h + attention.o_proj(mixed.transpose(0, 1).reshape(n, -1))
        if "gate" not in gain:
            gain["norm2"] = scale(own.post_attention_layernorm, h)
            normed = h * gain["norm2"] * own.post_attention_layernorm.weight
            gain["gate"] = torch.nn.functional.silu(mlp.gate_proj(normed))
        normed = h * gain["norm2"] * own.post_attention_layernorm.weight
        return h + mlp.down_proj(gain["gate"] * mlp.up_proj(normed)), gain

    h = x
    for number in range(layer):
        h, gain = block(number, h, None)
        gains.append(gain)

    def replay(z):
        for number, gain in enumerate(gains):
            z, _ = block(number, z, gain)
        return z[-1]

    return x, h[-1], replay


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_jacobian_is_that_of_a_replay_written_by_hand_with_frozen_gains(tiny, attention):
    loaded = tiny("llama", attention)
    n, d = len(IDS), loaded.hidden_size
    x, y, replay = _frozen_replay(loaded.model, IDS, layer=3)
    found = detached_jacobian(loaded.model, IDS, layer=3, profile="residual")
    # The replay is linear, so the Jacobian's columns are its values at the unit vectors: no differentiation at all.
    units = torch.eye(n * d, dtype=torch.float64).view(n * d, n, d)
    with torch.no_grad():
        expected = torch.stack([replay(unit) for unit in units]).view(n, d, d).transpose(1, 2)
    assert relative_error(replay(x), y) <= 1e-13
    # The model rounds its rotary tables, and eager attention its weights, to float32.
    assert relative_error(found.y, y) <= 1e-6
    assert relative_error(found.jacobian, expected) <= 1e-6


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", WITHOUT_POSITIONS)
def test_forward_and_reverse_derivatives_are_adjoint(tiny, family, attention):
    loaded = tiny(family, attention)
    generator = torch.Generator().manual_seed(5)
    found = detached_jacobian(loaded.model, IDS, layer=2, profile="golden")
    v = torch.randn(found.x.shape, dtype=torch.float64, generator=generator)
    u = torch.randn(found.y.shape, dtype=torch.float64, generator=generator)
    # The other CPU kernels of scaled dot product attention have no forward-mode derivative.
    with detached(loaded.model), sdpa_kernel(SDPBackend.MATH):
        _, forward = torch.func.jvp(
            lambda x: target_hidden_state(loaded.model, x[None], layer=2, profile="golden")[0], (found.x,), (v,)
        )
    reverse = torch.einsum("nij,i->nj", found.jacobian, u)
    assert float((u * forward).sum()) == pytest.approx(float((reverse * v).sum()), rel=1e-11)
    assert relative_error(torch.einsum("nij,nj->i", found.jacobian, v), forward) <= 1e-12


def test_no_token_after_a_sliding_window_is_reached_in_one_layer(tiny):
    found = detached_jacobian(tiny("gemma3").model, IDS, layer=1, profile="residual")
    # Block 0 slides over 3 tokens: the last token sees itself and two before it.
    assert not found.jacobian[:-3].any()
    assert found.jacobian[-3:].flatten(1).any(1).all()


@pytest.mark.parametrize("rows", [1, 7, 16, 40, 64])
def test_the_jacobian_does_not_depend_on_how_many_rows_a_pass_computes(tiny, rows):
    model = tiny("llama").model
    expected = detached_jacobian(model, IDS, layer=2, profile="residual")
    found = exact_jacobian(Replay(model, IDS, layer=2, profile="residual"), rows_per_pass=rows)
    assert relative_error(found, expected.jacobian) <= 1e-13


def test_one_token_is_a_prompt(tiny, family):
    found = detached_jacobian(tiny(family).model, (9,), layer=2, profile="residual")
    assert found.jacobian.shape[0] == 1
    assert found.reconstruction_error <= 1e-12


def test_an_architecture_without_a_table_is_refused_before_anything_is_computed(tiny):
    model = tiny("llama", fresh=True).model
    model.model.layers[0].mlp.act_fn = torch.nn.Identity()
    model.model.layers[0].mlp.down_proj = torch.nn.Bilinear(4, 4, 4)
    with pytest.raises(UnsupportedModelError, match="Bilinear"):
        detached_jacobian(model, IDS, layer=1, profile="residual")


@pytest.mark.model
@pytest.mark.parametrize(
    ("dtype", "layer", "profile", "bound"),
    [
        ("float32", 20, "residual", 5e-6),
        ("float32", 11, "golden", 5e-6),
        ("float64", 6, "residual", 1e-12),
    ],
)
def test_the_default_model_is_reconstructed(smollm, dtype, layer, profile, bound):
    loaded = smollm(dtype)
    ids = tuple(loaded.tokenizer("Golden Gate Bridge")["input_ids"])
    assert detached_jacobian(loaded.model, ids, layer=layer, profile=profile).reconstruction_error <= bound


@pytest.mark.model
def test_the_ordinary_jacobian_of_the_default_model_is_far_off(smollm):
    loaded = smollm("float32")
    ids = tuple(loaded.tokenizer("The bridge")["input_ids"])
    assert ordinary_jacobian(loaded.model, ids, layer=8, profile="residual").reconstruction_error > 0.3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("profile", ["golden", "residual"])
def test_the_replay_is_autograd_through_the_detached_model(tiny, family, profile, attention):
    loaded = tiny(family, attention)
    for layer in (1, loaded.num_layers - 1, loaded.num_layers):
        with detached(loaded.model):
            expected = ordinary_jacobian(loaded.model, IDS, layer=layer, profile=profile)
        found = detached_jacobian(loaded.model, IDS, layer=layer, profile=profile)
        assert relative_error(found.jacobian, expected.jacobian) <= 1e-12
        assert found.reconstruction_error <= 1e-12


def test_jvp_and_vjp_are_adjoint_and_are_products_with_the_jacobian(tiny, family):
    loaded = tiny(family)
    replay = Replay(loaded.model, IDS, layer=2, profile="golden")
    n, d = replay.shape
    generator = torch.Generator().manual_seed(7)
    v = torch.randn(3, n, d, dtype=torch.float64, generator=generator)
    u = torch.randn(3, d, dtype=torch.float64, generator=generator)
    products = replay.jvp(v)
    assert relative_error((replay.vjp(u) * v).sum((1, 2)), (u * products).sum(1)) <= 1e-12
    dense = detached_jacobian(loaded.model, IDS, layer=2, profile="golden").jacobian
    assert relative_error(products, torch.einsum("nij,lnj->li", dense, v)) <= 1e-12


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_biases_make_the_map_affine_and_its_offset_is_its_value_at_zero(tiny, family):
    found = detached_jacobian(tiny(family).model, IDS, layer=2, profile="residual")
    linear = torch.einsum("nij,nj->i", found.jacobian, found.x)
    assert relative_error(linear, found.y) > 0.01
    assert relative_error(linear + found.offset, found.y) <= 1e-13
