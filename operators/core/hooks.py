"""Pushing the inputs of a model's blocks, in ``torch.nn`` modules that take a hidden state (B, T, d) first.

    h_k <- h_k + |h_k| push_k        for the rows and tokens of the batch that have a push; the others keep their bits

One forward pass is :meth:`PushHooks.load`, the pass, :meth:`PushHooks.take_doses`. A push that was not added is an
error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from operators.core.apply import steer
from operators.core.errors import SteeringError
from operators.core.movement import Movement, movement


@dataclass(frozen=True, eq=False)
class LayerPush:
    """The pushes at one layer in one forward pass. Filled by the caller of :meth:`PushHooks.load`."""

    rows: torch.Tensor
    """(R,) int64: indices into the batch, each once, on the device of the hidden states."""
    push: torch.Tensor
    """(R, T, d) float32, in units of |h|: sum over the operators of (lambda/2) d_k/|d_k|."""
    where: torch.Tensor | None = None
    """(R, T) bool: the tokens that are pushed; None means all of them."""


def layer_push(pieces: Mapping[int, Sequence[tuple[slice, torch.Tensor]]], tokens: int) -> LayerPush:
    """The pushes at one layer in a pass over ``tokens`` tokens T.

    Args:
        pieces: by row of the batch, for each operator which of the T tokens it pushes, and its pushes (P, d) there.
            Those of one row add up.
    """
    first = next(push for row in pieces.values() for _, push in row)
    if all(len(part) == tokens for row in pieces.values() for _, part in row):
        # As after the prompt, token by token, in every row that is here.
        whole = torch.stack([sum((part for _, part in row[1:]), start=row[0][1]) for row in pieces.values()])
        return LayerPush(torch.tensor(list(pieces), device=first.device), whole)
    push = first.new_zeros(len(pieces), tokens, first.shape[-1])
    where = torch.zeros(len(pieces), tokens, dtype=torch.bool)
    for place, row in enumerate(pieces.values()):
        for at, part in row:
            push[place, at] += part
            where[place, at] = True
    rows = torch.tensor(list(pieces), device=push.device)
    return LayerPush(rows, push, None if bool(where.all()) else where.to(push.device))


class PushHooks:
    """``with PushHooks(blocks, layers) as hooks:`` hooks on the blocks of ``layers``, removed on every way out."""

    def __init__(self, blocks: Sequence[nn.Module] | nn.ModuleList, layers: Iterable[int]) -> None:
        self._blocks = blocks
        self._layers = sorted(set(layers))
        self._pushes: Mapping[int, LayerPush] = {}
        self._movements: dict[int, Movement] = {}
        self._removal = ExitStack()

    def __enter__(self) -> PushHooks:
        with ExitStack() as removal:
            for layer in self._layers:
                handle = self._blocks[layer].register_forward_pre_hook(self._hook(layer), with_kwargs=True)
                removal.callback(handle.remove)
            self._removal = removal.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._removal.close()

    def load(self, pushes: Mapping[int, LayerPush]) -> None:
        """Sets the pushes of the next forward pass, by layer; a layer without an entry is left alone."""
        self._pushes, self._movements = pushes, {}

    def take_doses(self) -> dict[int, torch.Tensor]:
        """The relative doses |h' - h|/|h| of :meth:`take_movements`, by layer, (R, T) each."""
        return {layer: moved.dose for layer, moved in self.take_movements().items()}

    def take_movements(self) -> dict[int, Movement]:
        """What the last forward pass did to the rows that were to be pushed, and the end of its pushes.

        Returns:
            By layer, (R, T) float32 on the model's device, in the order of the pushes that were loaded; without
            meaning at tokens that were not pushed. Nothing is copied to the host here.

        Raises:
            SteeringError: a hook did not run, so that its pushes were not added.
        """
        missing = next((layer for layer in self._pushes if layer not in self._movements), None)
        if missing is not None:
            raise SteeringError(f"layer {missing} was not reached: the model did not call its hook")
        movements = self._movements
        self.load({})
        return movements

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
        def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            loaded = self._pushes.get(layer)
            if loaded is None:
                return None
            hidden = self._pushed(layer, args[0] if args else kwargs["hidden_states"], loaded)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _pushed(self, layer: int, hidden: torch.Tensor, loaded: LayerPush) -> torch.Tensor:
        if layer in self._movements:
            raise SteeringError(f"layer {layer} was reached twice: one forward pass per set of pushes is accepted")
        before = hidden[loaded.rows]
        if before.shape != loaded.push.shape:
            # T of 1 would be broadcast over other tokens without an error.
            raise SteeringError(
                f"layer {layer}: pushes have the shape {tuple(loaded.push.shape)}; its input has rows of the shape "
                f"{tuple(before.shape)}"
            )
        after = steer(before, loaded.push)
        if loaded.where is not None:
            # Not a push of 0: float32 holds no float64, and -0.0 + 0.0 is 0.0.
            after = torch.where(loaded.where[..., None], after, before)
        pushed = hidden.index_copy(0, loaded.rows, after)
        # Of what the block is handed, whatever was said of it.
        self._movements[layer] = movement(before, pushed[loaded.rows], loaded.push)
        return pushed
