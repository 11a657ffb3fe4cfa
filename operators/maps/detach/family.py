"""The table of one architecture, as data: its classes are names, and nothing of transformers is imported for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from operators.maps.detach.experts import Mixture
from operators.maps.detach.rules import ForwardRule


@dataclass(frozen=True)
class GatedMLP:
    """``down(act(gate) * up)``: the attribute of the activation, and of the gate's own projection if it has one."""

    activation: str
    gate: str | None


@dataclass(frozen=True)
class PlainMLP:
    """``down(act(up))``: the attribute of the activation."""

    activation: str


MLP = GatedMLP | PlainMLP | Mixture


@dataclass(frozen=True)
class Attention:
    """``values`` gives V (l, n, K, e) of an input (l, n, d); ``output`` is the attribute of the output projection."""

    values: Callable[[Any, torch.Tensor], torch.Tensor]
    output: str


@dataclass(frozen=True, eq=False)
class Family:
    """How one architecture is made affine. A module is recognised by its exact class: a subclass may compute anything.

    ``causal_lm`` is the path of the model's class, ``package.module.Class``; the other classes are named by their path
    too, or by their name alone where they are in the same module. ``forwards`` maps each class whose forward is
    replaced (norms) to its detached forward; ``containers`` are the classes that only pass tensors on, add them, scale
    them by constants or look up positions. ``unset`` names the settings of the configuration that must be off, for what
    they switch on is not in the table.
    """

    name: str
    causal_lm: str
    forwards: Mapping[str, ForwardRule]
    mlps: Mapping[str, MLP]
    attentions: Mapping[str, Attention]
    containers: frozenset[str]
    unset: tuple[str, ...] = ()

    @property
    def model_class(self) -> str:
        """The name of the model's class."""
        return self.causal_lm.rpartition(".")[2]
