"""One table per architecture: which rule applies to which of its module classes.

Every module of a model must be in its table; a model with any other is refused, and nothing is guessed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from operators.core.errors import UnsupportedModelError
from operators.maps.detach.rules import NormForward, late_rms_norm, layer_norm, offset_rms_norm, rms_norm, wide_linear

_LINEAR: frozenset[type[nn.Module]] = frozenset({nn.Linear, Conv1D, nn.Embedding, nn.ModuleList, nn.Dropout})
"""Classes that need no rule: affine in their input, or before the map (embeddings), or the identity in evaluation."""


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
    """How one architecture is made affine. A module is recognised by its exact class: a subclass may compute anything.

    ``norms`` maps each norm class to its detached forward; ``containers`` are the classes that only pass tensors on,
    add them, scale them by constants or look up positions.
    """

    name: str
    causal_lm: type[nn.Module]
    norms: Mapping[type[nn.Module], NormForward]
    mlps: Mapping[type[nn.Module], GatedMLP | PlainMLP]
    attentions: Mapping[type[nn.Module], Attention]
    containers: frozenset[type[nn.Module]]


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


@dataclass(frozen=True)
class _BuiltInFamily:
    """A family of this package, before the module of transformers that has its classes is imported.

    ``causal_lm`` is the name of its class there; ``fill`` makes the table out of the imported module.
    """

    name: str
    causal_lm: str
    fill: Callable[[ModuleType], Family]

    @property
    def module(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"

    def load(self) -> Family:
        return self.fill(importlib.import_module(self.module))


def _llama_like(
    name: str, norm: NormForward, *, decoder: str = "Model", containers: tuple[str, ...] = ()
) -> _BuiltInFamily:
    """The common shape: RMSNorm, q/k/v/o projections, SwiGLU or GeGLU, named after the family."""
    prefix = name.capitalize()

    def fill(module: ModuleType) -> Family:
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

    return _BuiltInFamily(name, f"{prefix}ForCausalLM", fill)


def _phi3(module: Any) -> Family:
    return Family(
        name="phi3",
        causal_lm=module.Phi3ForCausalLM,
        norms={module.Phi3RMSNorm: rms_norm(eps="variance_epsilon")},
        mlps={module.Phi3MLP: GatedMLP("activation_fn", gate=None)},
        attentions={module.Phi3Attention: Attention(_phi3_values, output="o_proj")},
        containers=frozenset({module.Phi3Model, module.Phi3DecoderLayer, module.Phi3RotaryEmbedding}),
    )


def _gpt2(module: Any) -> Family:
    return Family(
        name="gpt2",
        causal_lm=module.GPT2LMHeadModel,
        norms={nn.LayerNorm: layer_norm(eps="eps")},
        mlps={module.GPT2MLP: PlainMLP("act")},
        attentions={module.GPT2Attention: Attention(_gpt2_values, output="c_proj")},
        containers=frozenset({module.GPT2Model, module.GPT2Block}),
    )


_BUILT_IN = (
    _llama_like("llama", rms_norm(eps="variance_epsilon")),
    _llama_like("qwen2", rms_norm(eps="variance_epsilon")),
    _llama_like("qwen3", rms_norm(eps="variance_epsilon")),
    _llama_like("mistral", rms_norm(eps="variance_epsilon")),
    _llama_like("ministral", rms_norm(eps="variance_epsilon")),
    _llama_like("olmo2", late_rms_norm(eps="variance_epsilon")),
    _llama_like("gemma3", offset_rms_norm(eps="eps"), decoder="TextModel", containers=("TextScaledWordEmbedding",)),
    _BuiltInFamily("phi3", "Phi3ForCausalLM", _phi3),
    _BuiltInFamily("gpt2", "GPT2LMHeadModel", _gpt2),
)


_registered: tuple[Family, ...] = ()
_GUIDE = "docs/ARCHITECTURES.md says how to add"


def families() -> tuple[Family, ...]:
    """Every table: those of this package, then the registered ones. Imports the model modules of all of them."""
    return (*(_loaded(built_in) for built_in in _BUILT_IN), *_registered)


def register(family: Family) -> None:
    """Adds the table of another architecture, for the rest of this process.

    Raises:
        ValueError: the class has a table already. Tables are never replaced: an operator must not depend on
            what was imported before it was built.
    """
    global _registered
    if _table_of(family.causal_lm) is not None:
        raise ValueError(f"{family.causal_lm.__name__} has a detach table already; a table cannot be replaced")
    _registered = (*_registered, family)


@functools.cache
def _loaded(built_in: _BuiltInFamily) -> Family:
    return built_in.load()


def _table_of(causal_lm: type[nn.Module]) -> Family | None:
    """The table of exactly this class; imports no module of transformers but the one that ``causal_lm`` is from."""
    for built_in in _BUILT_IN:
        if (built_in.module, built_in.causal_lm) == (causal_lm.__module__, causal_lm.__qualname__):
            found = _loaded(built_in)
            return found if found.causal_lm is causal_lm else None
    return next((family for family in _registered if family.causal_lm is causal_lm), None)


def family_of(model: nn.Module) -> Family:
    """The table of this model, after checking that every module is in it.

    Raises:
        UnsupportedModelError: names the first module, and its class, that no rule covers; or the model is not
            in evaluation mode.
    """
    family = _table_of(type(model))
    if family is None:
        registered = (family.causal_lm.__name__ for family in _registered)
        known = ", ".join(sorted([*(built_in.causal_lm for built_in in _BUILT_IN), *registered]))
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
        if type(module) not in known_classes and activations.isdisjoint(_path_and_parents(name)):
            raise UnsupportedModelError(
                f"{type(model).__name__}: module {name!r} of class {type(module).__name__} is in no rule of "
                f"the {family.name!r} table; {_GUIDE} it"
            )
    return family


def _path_and_parents(name: str) -> Iterator[str]:
    """``"a.b.c"``: a, a.b and a.b.c."""
    return accumulate(name.split("."), "{}.{}".format)
