"""The maps of several texts as one: their weighted sum, right-aligned.

T texts of n_t tokens have maps J^t, c^t and values y^t. With n = max n_t, each J^t is padded with n - n_t zero blocks
in front, so that the last tokens coincide. For weights w_t (1/T for the mean of a concept's texts; of any sign for a
mixture of operators),

    J_i = sum_t w_t J^t_i,    y = sum_t w_t y^t,    c = sum_t w_t c^t.

The steering direction, before it is normalised, is linear in these: it is the weighted sum of those that the texts give
one by one. What the texts have in common adds up; what only one text has is scaled down by its weight.

Cost: every product of the sum is one product of each text's replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from operators.maps.replay import Replay


class TextMap(Protocol):
    """What of one text's map adds up: see :class:`~operators.maps.replay.Replay`."""

    y: torch.Tensor
    offset: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        ...

    def last_term(self) -> torch.Tensor:
        """J_{n-1} x_{n-1}, shape (d,)."""
        ...


class SummedTexts:
    """All of a weighted sum of one or more texts but its products.

    Attributes:
        y: (d,) = sum_t w_t y^t.
        offset: (d,) = c.
        last_term: (d,) = sum_t w_t J^t_{n-1} x^t_{n-1}, the part of ``y`` that the last tokens contribute.
        shape: (n, d), with n that of the longest text.
    """

    def __init__(self, texts: Sequence[TextMap], weights: Sequence[float]) -> None:
        self.weights = tuple(weights)
        self.shape = max(text.shape for text in texts)
        self.y = self.add([text.y for text in texts])
        self.offset = self.add([text.offset for text in texts])
        self.last_term = self.add([text.last_term() for text in texts])

    def substitute_base(self, basis: torch.Tensor | None) -> torch.Tensor:
        """b = y - U U^T sum_t w_t J^t_{n-1} x^t_{n-1}, shape (d,), for ``basis`` U (d, r); None means U = 1."""
        last = self.last_term
        return self.y - (last if basis is None else basis @ (basis.T @ last))

    def own(self, text: TextMap) -> slice:
        """The positions of the sum that are a text's."""
        return slice(self.shape[0] - text.shape[0], None)

    def add(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """sum_t w_t v_t, for one of each text."""
        terms = [weight * value for weight, value in zip(self.weights, values, strict=True)]
        return torch.stack(terms).sum(0)


class WeightedMap(SummedTexts):
    """The weighted sum of one or more replays: an :class:`~operators.maps.replay.AffineMap`."""

    def __init__(self, replays: Sequence[Replay], weights: Sequence[float]) -> None:
        super().__init__(replays, weights)
        self._replays = tuple(replays)

    def jvp(self, tangents: torch.Tensor) -> torch.Tensor:
        """J V, shape (l, d), for V (l, n, d)."""
        return self.add([replay.jvp(tangents[:, self.own(replay)]) for replay in self._replays])

    def vjp(self, cotangents: torch.Tensor) -> torch.Tensor:
        """J^T U, shape (l, n, d), for U (l, d)."""
        products = cotangents.new_zeros(len(cotangents), *self.shape)
        for replay, weight in zip(self._replays, self.weights, strict=True):
            products[:, self.own(replay)].add_(replay.vjp(cotangents), alpha=weight)
        return products
