"""Measuring what a step's hooks did, for all layers together: a step has few rows per layer, and many layers.

The hooks keep the hidden states as they found them before and after; how far these moved is worked out once the forward
pass is over, in a few operations for all layers. Where a chunk is full, it is worked out before more is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from operators.core.movement import Movement, join_movements, movement
from steer_server.engine.vllm.worker.chunked_pushes import tokens_per_chunk
from steer_server.engine.vllm.worker.step_push import StepPush, joined


@dataclass(frozen=True, eq=False)
class PushedStates:
    """Hidden states (R, d) of one layer around their pushes. Filled by the layer's hook."""

    step_push: StepPush
    """Whose they are: all of its rows or, of a large step, the next of them."""
    push: torch.Tensor
    """(R, d) float32."""
    before: torch.Tensor
    after: torch.Tensor
    """As the layer is handed them."""
    residual: torch.Tensor | None
    """Where the hidden state is ``before + residual``."""


class StepMovements:
    """The movements of one forward pass. Filled by the hooks; :meth:`measure` writes them into ``StepPush.moved``."""

    def __init__(self) -> None:
        self._kept: list[PushedStates] = []
        self._num_rows = 0

    def add(self, states: PushedStates) -> None:
        """Keeps the states of one layer, no more of them than a chunk holds."""
        rows, width = states.push.shape
        if self._num_rows + rows > tokens_per_chunk(width):
            self.measure()
        self._kept.append(states)
        self._num_rows += rows

    def measure(self) -> None:
        """Works out the movements of all that was kept, and forgets it. Nothing is read from the device."""
        kept, self._kept, self._num_rows = self._kept, [], 0
        # vLLM's first layer has no residual, all others have one.
        for alike in ([one for one in kept if one.residual is None], [one for one in kept if one.residual is not None]):
            if alike:
                _measure(alike)


def _measure(kept: Sequence[PushedStates]) -> None:
    residuals = [one.residual for one in kept if one.residual is not None]
    moved = movement(
        joined([one.before for one in kept]),
        joined([one.after for one in kept]),
        joined([one.push for one in kept]),
        joined(residuals) if residuals else None,
    )
    if len(kept) == 1:
        parts = [moved]
    else:
        counts = [one.push.shape[0] for one in kept]
        split = (torch.split(getattr(moved, each.name), counts) for each in fields(Movement))
        parts = [Movement(*of_one) for of_one in zip(*split, strict=True)]
    for one, part in zip(kept, parts, strict=True):
        found = one.step_push.moved
        one.step_push.moved = part if found is None else join_movements([found, part])
