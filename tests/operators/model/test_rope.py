import contextlib

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from operators.model.rope import RopeChange, RopeOfLength, rope_change_within, rope_changes

_ORIGINAL = 16


def _config(kind):
    parameters = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _ORIGINAL,
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 4.0, 6.0, 8.0],
    }
    known = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor", "original_max_position_embeddings"),
        "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }.get(kind, ("factor",))
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64 if kind == "longrope" else _ORIGINAL,
        rope_parameters={name: parameters[name] for name in ("rope_type", "rope_theta", *known)},
    )


@pytest.mark.parametrize("kind", sorted(ROPE_INIT_FUNCTIONS))
def test_every_kind_of_factors_that_depends_on_the_length_is_known(kind):
    config = _config(kind)
    short, long = (ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=n)[0] for n in (8, 40))
    assert bool(rope_changes(config)) is not torch.equal(short, long)


@pytest.mark.parametrize(
    ("kind", "first", "last", "met"),
    [
        ("longrope", 1, 16, False),
        ("longrope", 16, 17, True),
        ("longrope", 17, 40, False),
        ("dynamic", 1, 16, False),
        ("dynamic", 17, 40, True),
        ("yarn", 1, 40, False),
    ],
)
def test_a_sequence_that_grows_over_a_change_is_known(kind, first, last, met):
    change = rope_change_within(_config(kind), first, last)
    assert change == (RopeChange(kind, _ORIGINAL, again=kind == "dynamic") if met else None)


def _model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(_config("longrope")).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return model


def _in_parts(model, ids, chunk, held):
    rope, cache, parts = RopeOfLength(model), None, []
    for part in torch.split(ids, chunk, 1):
        with rope.fixed(ids.shape[1]) if held else contextlib.nullcontext():
            output = model(part, past_key_values=cache, use_cache=True)
        cache, parts = output.past_key_values, [*parts, output.logits]
        # Another sequence in between, of the other factors.
        model(ids[:, :3])
    return torch.cat(parts, 1)


@pytest.mark.parametrize("chunk", [1, 5, 16, 40])
@torch.inference_mode()
def test_a_prompt_in_parts_has_the_factors_of_the_whole(chunk):
    model, ids = _model(), torch.arange(40)[None] % 64
    whole = model(ids).logits
    torch.testing.assert_close(_in_parts(model, ids, chunk, held=True), whole)
    assert chunk == 40 or not torch.allclose(_in_parts(model, ids, chunk, held=False), whole, atol=1e-2)
    assert "forward" not in model.model.rotary_emb.__dict__
