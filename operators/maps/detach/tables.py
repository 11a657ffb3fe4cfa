"""The tables of this package, as data. docs/ARCHITECTURES.md says what to look for in a model's file.

Architectures that are alike share a function, so that one of them is a line. Nothing of transformers is imported here.
"""

from __future__ import annotations

from typing import Any

import torch

from operators.maps.detach.experts import Mixture, clamped_gate
from operators.maps.detach.family import MLP, Attention, Family, GatedMLP, PlainMLP
from operators.maps.detach.rules import ForwardRule, late_rms_norm, layer_norm, offset_rms_norm, rms_norm, wide_linear


def projected_values(module: Any, x: torch.Tensor) -> torch.Tensor:
    """V (l, n, K, e) of x (l, n, d), for an attention with a separate projection ``v_proj``."""
    values: torch.Tensor = module.v_proj(x).view(*x.shape[:2], -1, module.head_dim)
    return values


def _phi3_values(module: Any, x: torch.Tensor) -> torch.Tensor:
    # One projection gives Q, K and V, in this order.
    size = module.num_key_value_heads * module.head_dim
    return wide_linear(x, module.qkv_proj.weight[-size:], None).view(*x.shape[:2], -1, module.head_dim)


def _gpt2_values(module: Any, x: torch.Tensor) -> torch.Tensor:
    # One projection gives Q, K and V, in this order. It is a Conv1D, whose weight is (in, out).
    weight, bias = module.c_attn.weight[:, -module.embed_dim :], module.c_attn.bias[-module.embed_dim :]
    return wide_linear(x, weight.T, bias).view(*x.shape[:2], -1, module.head_dim)


def _neox_values(module: Any, x: torch.Tensor) -> torch.Tensor:
    # One projection gives Q, K and V of the first head, then of the second.
    size = module.head_size
    weight = module.query_key_value.weight.view(-1, 3, size, x.shape[-1])[:, 2].flatten(0, 1)
    bias = module.query_key_value.bias
    bias = None if bias is None else bias.view(-1, 3, size)[:, 2].flatten()
    return wide_linear(x, weight, bias).view(*x.shape[:2], -1, size)


def _latent_values(module: Any, x: torch.Tensor) -> torch.Tensor:
    # K without positions and V of every head are made of one normed vector of few numbers.
    latent = module.kv_a_layernorm(module.kv_a_proj_with_mqa(x)[..., : module.kv_lora_rank])
    heads = module.kv_b_proj(latent).view(*x.shape[:2], module.num_heads, -1)
    values: torch.Tensor = heads[..., module.qk_nope_head_dim :]
    return values


_LAYER_NORM = "torch.nn.LayerNorm"
_SWIGLU = GatedMLP("act_fn", gate="gate_proj")
_RMS = rms_norm(eps="variance_epsilon")
_LATE_RMS = late_rms_norm(eps="variance_epsilon")
_OFFSET_RMS = offset_rms_norm(eps="eps")
_SPARSE = Mixture("gate", "experts")
_SPARSE_AND_SHARED = Mixture("gate", "experts", shared="shared_experts")
_CAUSAL = ("use_bidirectional_attention",)


def _like_llama(
    name: str,
    prefix: str,
    norm: ForwardRule = _RMS,
    *,
    norm_class: str | None = None,
    mlps: dict[str, MLP] | None = None,
    attention: Attention | None = None,
    also: tuple[str, ...] = (),
    decoder: str = "Model",
    unset: tuple[str, ...] = (),
) -> Family:
    """The common shape: RMSNorm, q/k/v/o projections, SwiGLU or GeGLU. Classes have names that begin with ``prefix``.

    Args:
        mlps: by what follows ``prefix``; None for a SwiGLU.
        also: containers that Llama does not have.
    """
    return Family(
        name=name,
        causal_lm=f"transformers.models.{name}.modeling_{name}.{prefix}ForCausalLM",
        forwards={norm_class or f"{prefix}RMSNorm": norm},
        mlps={f"{prefix}{suffix}": table for suffix, table in (mlps or {"MLP": _SWIGLU}).items()},
        attentions={f"{prefix}Attention": attention or Attention(projected_values, output="o_proj")},
        containers=frozenset(f"{prefix}{suffix}" for suffix in (decoder, "DecoderLayer", "RotaryEmbedding", *also)),
        unset=unset,
    )


_PHI3 = _like_llama(
    "phi3",
    "Phi3",
    mlps={"MLP": GatedMLP("activation_fn", gate=None)},
    attention=Attention(_phi3_values, output="o_proj"),
)
_GPT2 = Family(
    name="gpt2",
    causal_lm="transformers.models.gpt2.modeling_gpt2.GPT2LMHeadModel",
    forwards={_LAYER_NORM: layer_norm(eps="eps")},
    mlps={"GPT2MLP": PlainMLP("act")},
    attentions={"GPT2Attention": Attention(_gpt2_values, output="c_proj")},
    containers=frozenset({"GPT2Model", "GPT2Block"}),
)
_GPT_NEOX = Family(
    name="gpt_neox",
    causal_lm="transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXForCausalLM",
    forwards={_LAYER_NORM: layer_norm(eps="eps")},
    mlps={"GPTNeoXMLP": PlainMLP("act")},
    attentions={"GPTNeoXAttention": Attention(_neox_values, output="dense")},
    containers=frozenset({"GPTNeoXModel", "GPTNeoXLayer", "GPTNeoXRotaryEmbedding"}),
)
_DEEPSEEK_V3 = _like_llama(
    "deepseek_v3",
    "DeepseekV3",
    mlps={"MLP": _SWIGLU, "MoE": _SPARSE_AND_SHARED},
    attention=Attention(_latent_values, output="o_proj"),
    also=("TopkRouter", "Experts"),
)
_GPT_OSS = _like_llama(
    "gpt_oss",
    "GptOss",
    _LATE_RMS,
    mlps={"MLP": Mixture("router", "experts", gate=clamped_gate, with_weights=True)},
    also=("TopKRouter", "Experts"),
)
_SCALED = ("TextScaledWordEmbedding",)
_ROUTED = ("TopKRouter", "Experts")

BUILT_IN = (
    _like_llama("llama", "Llama"),
    _like_llama("qwen2", "Qwen2"),
    _like_llama("qwen3", "Qwen3"),
    _like_llama("mistral", "Mistral"),
    _like_llama("ministral", "Ministral"),
    _like_llama("ministral3", "Ministral3"),
    _like_llama("smollm3", "SmolLM3"),
    _like_llama("seed_oss", "SeedOss"),
    _like_llama("exaone4", "Exaone4"),
    _like_llama("granite", "Granite"),
    _like_llama("olmo2", "Olmo2", _LATE_RMS),
    _like_llama("olmo3", "Olmo3", _LATE_RMS),
    _like_llama("glm4", "Glm4", mlps={"MLP": GatedMLP("activation_fn", gate=None)}),
    _like_llama("gemma", "Gemma", _OFFSET_RMS, also=_SCALED, unset=_CAUSAL),
    _like_llama("gemma2", "Gemma2", _OFFSET_RMS, also=_SCALED, unset=_CAUSAL),
    _like_llama("gemma3", "Gemma3", _OFFSET_RMS, decoder="TextModel", also=_SCALED, unset=_CAUSAL),
    _like_llama("cohere2", "Cohere2", layer_norm(eps="variance_epsilon"), norm_class="Cohere2LayerNorm"),
    _like_llama("stablelm", "StableLm", layer_norm(eps="eps"), norm_class=_LAYER_NORM, also=("LayerNormPerHead",)),
    _like_llama(
        "nemotron",
        "Nemotron",
        layer_norm(eps="eps", offset=1.0),
        norm_class="NemotronLayerNorm1P",
        mlps={"MLP": PlainMLP("act_fn")},
    ),
    _like_llama(
        "starcoder2", "Starcoder2", layer_norm(eps="eps"), norm_class=_LAYER_NORM, mlps={"MLP": PlainMLP("act")}
    ),
    _PHI3,
    _GPT2,
    _GPT_NEOX,
    _like_llama("qwen3_moe", "Qwen3Moe", mlps={"MLP": _SWIGLU, "SparseMoeBlock": _SPARSE}, also=_ROUTED),
    _like_llama("mixtral", "Mixtral", mlps={"SparseMoeBlock": _SPARSE}, also=_ROUTED),
    _like_llama("olmoe", "Olmoe", mlps={"SparseMoeBlock": _SPARSE}, also=_ROUTED, unset=("clip_qkv",)),
    _DEEPSEEK_V3,
    _GPT_OSS,
)
