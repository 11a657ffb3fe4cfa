"""The map of texts whose products are sweeps over the blocks of a model: see :mod:`operators.maps.sweeps`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from operators.maps.frozen_block import FrozenBlock, record
from operators.maps.sweeps import StreamedText, Sweeps, norm_pulled, normed
from operators.maps.weighted_map import SummedTexts

if TYPE_CHECKING:
    from torch import nn


class StreamedMap(SummedTexts):
    """The weighted sum of recorded texts, each product one sweep over the blocks."""

    def __init__(self, sweeps: Sweeps, texts: Sequence[StreamedText], weights: Sequence[float]) -> None:
        super().__init__(texts, weights)
        self._sweeps, self._texts = sweeps, tuple(texts)

    def jvp(self, tangents: torch.Tensor) -> torch.Tensor:
        """J V, shape (l, d), for V (l, n, d)."""
        states = [tangents[:, self.own(text)].clone() for text in self._texts]

        def visit(index: int, block: nn.Module) -> None:
            for which, frozen in enumerate(self._frozen(index, block)):
                states[which] = frozen.push(states[which])

        self._sweeps.forward(visit)
        values = [normed(self._sweeps, text, state) for text, state in zip(self._texts, states, strict=True)]
        return self.add([value - text.offset for text, value in zip(self._texts, values, strict=True)])

    def vjp(self, cotangents: torch.Tensor) -> torch.Tensor:
        """J^T U, shape (l, n, d), for U (l, d)."""
        states = [norm_pulled(self._sweeps, text, cotangents) for text in self._texts]

        def visit(index: int, block: nn.Module) -> None:
            for which, frozen in enumerate(self._frozen(index, block)):
                states[which] = frozen.pull(states[which], self._texts[which].shape[0])

        self._sweeps.backward(visit)
        if len(states) == 1:
            return states[0].mul_(self.weights[0])
        products = cotangents.new_zeros(len(cotangents), *self.shape)
        for text, state, weight in zip(self._texts, states, self.weights, strict=True):
            products[:, self.own(text)].add_(state, alpha=weight)
        return products

    def _frozen(self, index: int, block: nn.Module) -> list[FrozenBlock]:
        sweeps, last = self._sweeps, index == self._sweeps.layer - 1
        tapes = [record(sweeps.model, block, text.calls[index], text.streams[index])[0] for text in self._texts]
        # After recording, which is in the model's own dtype.
        block.to(sweeps.wide)
        return [
            sweeps.frozen(block, tape, text.shape[0], last=last) for text, tape in zip(self._texts, tapes, strict=True)
        ]
