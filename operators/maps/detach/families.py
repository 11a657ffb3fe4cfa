"""One table per architecture. Everything in a model must be in its table; nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.llama import modeling_llama as llama
from transformers.models.ministral import modeling_ministral as ministral
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.pytorch_utils import Conv1D

from operators.core.errors import UnsupportedModelError
from operators.maps.detach.rules import NormForward, late_rms_norm, layer_norm, offset_rms_norm, rms_norm, wide_linear

# Linear (or affine) in their input, looked up before the map begins, or the identity in evaluation mode.
_LINEAR: frozenset[type[nn.Module]] = frozenset({nn.Linear, Conv1D, nn.Embedding, nn.ModuleList, nn.Dropout})


@dataclass(frozen=True)
class GatedMLP:
    """``down(act(gate) * up)``: the attribute of the activation, and of the gate's own projection if it has one."""

    activation: str
    gate: str | None


@dataclass(frozen=True)
class PlainMLP:
    """``down(act(up))``: the attribute of the activation."""

    activation: str


@dataclass(frozen=True)
class Attention:
    """``values`` gives V (l, n, K, e) of an input (l, n, d); ``output`` is the attribute of the output projection."""

    values: Callable[[Any, torch.Tensor], torch.Tensor]
    output: str


@dataclass(frozen=True)
class Family:
    """How one architecture is made linear. Modules are known by their exact class.

    ``norms`` maps each norm class to its detached forward; ``containers`` only pass tensors on.
    """

    name: str
    causal_lm: type[nn.Module]
    norms: Mapping[type[nn.Module], NormForward]
    mlps: Mapping[type[nn.Module], GatedMLP | PlainMLP]
    attentions: Mapping[type[nn.Module], Attention]
    containers: frozenset[type[nn.Module]]


def projected_values(module: Any, x: torch.Tensor) -> torch.Tensor:
    """V (l, n, K, e) where the attention has a projection ``v_proj`` of its own."""
    values: torch.Tensor = module.v_proj(x).view(*x.shape[:2], -1, module.head_dim)
    return values


def _phi3_values(module: Any, x: torch.Tensor) -> torch.Tensor:
    size = module.num_key_value_heads * module.head_dim
    return wide_linear(x, module.qkv_proj.weight[-size:], None).view(*x.shape[:2], -1, module.head_dim)


def _gpt2_values(module: Any, x: torch.Tensor) -> torch.Tensor:
    weight, bias = module.c_attn.weight[:, -module.embed_dim :], module.c_attn.bias[-module.embed_dim :]
    return wide_linear(x, weight.T, bias).view(*x.shape[:2], -1, module.head_dim)


def _llama_like(
    name: str, module: ModuleType, norm: NormForward, *, decoder: str = "Model", containers: tuple[str, ...] = ()
) -> Family:
    """The common shape: RMSNorm, q/k/v/o projections, SwiGLU or GeGLU, named after the family."""
    prefix = module.__name__.rpartition("modeling_")[2].capitalize()

    def cls(suffix: str) -> type[nn.Module]:
        found: type[nn.Module] = getattr(module, prefix + suffix)
        return found

    return Family(
        name=name,
        causal_lm=cls("ForCausalLM"),
        norms={cls("RMSNorm"): norm},
        mlps={cls("MLP"): GatedMLP("act_fn", gate="gate_proj")},
        attentions={cls("Attention"): Attention(projected_values, output="o_proj")},
        containers=frozenset(map(cls, (decoder, "DecoderLayer", "RotaryEmbedding", *containers))),
    )


_FAMILIES = (
    _llama_like("llama", llama, rms_norm(eps="variance_epsilon")),
    _llama_like("qwen2", qwen2, rms_norm(eps="variance_epsilon")),
    _llama_like("qwen3", qwen3, rms_norm(eps="variance_epsilon")),
    _llama_like("mistral", mistral, rms_norm(eps="variance_epsilon")),
    _llama_like("ministral", ministral, rms_norm(eps="variance_epsilon")),
    _llama_like("olmo2", olmo2, late_rms_norm(eps="variance_epsilon")),
    _llama_like(
        "gemma3",
        gemma3,
        offset_rms_norm(eps="eps"),
        decoder="TextModel",
        containers=("TextScaledWordEmbedding",),
    ),
    Family(
        name="phi3",
        causal_lm=phi3.Phi3ForCausalLM,
        norms={phi3.Phi3RMSNorm: rms_norm(eps="variance_epsilon")},
        mlps={phi3.Phi3MLP: GatedMLP("activation_fn", gate=None)},
        attentions={phi3.Phi3Attention: Attention(_phi3_values, output="o_proj")},
        containers=frozenset({phi3.Phi3Model, phi3.Phi3DecoderLayer, phi3.Phi3RotaryEmbedding}),
    ),
    Family(
        name="gpt2",
        causal_lm=gpt2.GPT2LMHeadModel,
        norms={nn.LayerNorm: layer_norm(eps="eps")},
        mlps={gpt2.GPT2MLP: PlainMLP("act")},
        attentions={gpt2.GPT2Attention: Attention(_gpt2_values, output="c_proj")},
        containers=frozenset({gpt2.GPT2Model, gpt2.GPT2Block}),
    ),
)


_registered: tuple[Family, ...] = ()
_GUIDE = "docs/ARCHITECTURES.md says how to add"


def families() -> tuple[Family, ...]:
    """Every table there is: those of this package, then the registered ones."""
    return _FAMILIES + _registered


def register(family: Family) -> None:
    """Adds the table of another architecture, for the rest of this process.

    Raises:
        ValueError: the class has a table already. Tables are never replaced: an operator must not depend on
            what was imported before it was built.
    """
    global _registered
    if any(family.causal_lm is known.causal_lm for known in families()):
        raise ValueError(f"{family.causal_lm.__name__} has a detach table already; a table cannot be replaced")
    _registered = (*_registered, family)


def family_of(model: nn.Module) -> Family:
    """The table of this model, after checking that every module is in it.

    Raises:
        UnsupportedModelError: names the first module, and its class, that no rule covers; or the model is not
            in evaluation mode.
    """
    family = next((family for family in families() if family.causal_lm is type(model)), None)
    if family is None:
        known = ", ".join(sorted(family.causal_lm.__name__ for family in families()))
        raise UnsupportedModelError(
            f"{type(model).__name__} has no detach table; there are tables for {known}. {_GUIDE} one"
        )
    if model.training:
        raise UnsupportedModelError(
            f"{type(model).__name__} is in training mode; dropout is no linear map: call eval()"
        )
    known_classes = {family.causal_lm, *family.norms, *family.mlps, *family.attentions, *family.containers, *_LINEAR}
    activations = {
        f"{name}.{table.activation}"
        for name, module in model.named_modules()
        for kind, table in family.mlps.items()
        if type(module) is kind
    }
    for name, module in model.named_modules():
        inside_activation = any(name == path or name.startswith(f"{path}.") for path in activations)
        if type(module) not in known_classes and not inside_activation:
            raise UnsupportedModelError(
                f"{type(model).__name__}: module {name!r} of class {type(module).__name__} is in no rule of "
                f"the {family.name!r} table; {_GUIDE} it"
            )
    return family
