"""Attention outside of the attention interface of transformers: its weights would stay live when all is frozen."""

import sys
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.errors import ReconstructionError, UnsupportedModelError
from operators.maps.detach import detached, families, family_of, recording, register
from operators.maps.detach.rules import frozen_sdpa
from operators.maps.replay import Replay

IDS = (277, 12, 290, 65, 278)


class OwnAttention(LlamaAttention):
    """As in Falcon: a softmax of its own."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            layer(hidden_states).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        k, v = (modeling_llama.repeat_kv(part, self.num_key_value_groups) for part in (k, v))
        logits = q @ k.transpose(2, 3) * self.scaling
        hidden = torch.ones_like(logits[0, 0]).triu(1).bool()
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2)), None


class Elsewhere(LlamaAttention):
    """In a file without an eager attention."""


class OwnCausalLM(LlamaForCausalLM):
    pass


@pytest.fixture
def own(tiny, monkeypatch):
    """``own(attention, kind)``: a Llama with such an attention, and a table that names it."""
    monkeypatch.setattr(sys.modules["operators.maps.detach.families"], "_registered", ())
    (llama,) = (family for family in families() if family.name == "llama")
    # Every class by its path: that of the model is in another module than they are.
    llamas = llama.causal_lm.rpartition(".")[0]
    names = {*llama.forwards, *llama.mlps, *llama.attentions, *llama.containers}
    own_names = ("OwnAttention", "Elsewhere")
    at = {name: f"{llamas}.{name}" for name in names} | {name: f"{__name__}.{name}" for name in own_names}
    (attention,) = llama.attentions.values()
    own = replace(
        llama,
        name="own",
        causal_lm=f"{__name__}.OwnCausalLM",
        forwards={at[name]: rule for name, rule in llama.forwards.items()},
        mlps={at[name]: rule for name, rule in llama.mlps.items()},
        attentions=dict.fromkeys((at["OwnAttention"], at["Elsewhere"], at["LlamaAttention"]), attention),
        containers=frozenset(at[name] for name in llama.containers),
    )
    register(own)

    def make(attention="sdpa", kind=OwnAttention):
        model = tiny("llama", attention, fresh=True).model
        model.__class__ = OwnCausalLM
        for layer in model.model.layers[1:]:
            layer.self_attn.__class__ = kind
        return model

    return make


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_refused_by_name_however_the_map_is_asked_for(own, attention):
    model = own(attention)
    assert family_of(model).name == "own"
    x = model.get_input_embeddings()(torch.tensor([IDS]))
    words = r"'model\.layers\.1\.self_attn' of class OwnAttention computes its attention itself"
    for block in (detached, recording):
        with pytest.raises(UnsupportedModelError, match=words), block(model):
            model(inputs_embeds=x)
    with pytest.raises(UnsupportedModelError, match=words):
        Replay(model, IDS, layer=4, profile="residual")
    # Nothing is left of the attempt.
    assert model.config._attn_implementation == attention
    model(inputs_embeds=x)


def test_eager_attention_of_a_file_that_has_none_is_refused_by_name(own):
    with pytest.raises(UnsupportedModelError, match=r"Elsewhere: its file .* has no eager_attention_forward"):
        Replay(own("eager", Elsewhere), IDS, layer=4, profile="residual")


def test_a_build_compares_gradients_with_the_replay(tiny, monkeypatch):
    loaded = tiny("llama", fresh=True)
    spec = BuildSpec((concept_from_text("The golden bridge", loaded),))
    build_operator(spec, loaded)

    def live(module, query, key, value, *args, **kwargs):
        # What was forgotten: queries and keys keep their gradients.
        frozen, _ = frozen_sdpa(module, query, key, value, *args, **kwargs)
        return frozen + (query * 0.1).transpose(1, 2) - (query * 0.1).detach().transpose(1, 2), None

    before = AttentionInterface._global_mapping["detached_sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "detached_sdpa", live)
    assert before is not live
    with pytest.raises(ReconstructionError, match="gradients of the detached model differ from its replay's by"):
        build_operator(spec, loaded)
