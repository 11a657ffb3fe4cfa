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

import torch

from operators.maps.replay import Replay


class WeightedMap:
    """The weighted sum of one or more replays: an :class:`~operators.maps.replay.AffineMap`.

    Attributes:
        y: (d,) = sum_t w_t y^t.
        offset: (d,) = c.
        last_term: (d,) = sum_t w_t J^t_{n-1} x^t_{n-1}, the part of ``y`` that the last tokens contribute.
    """

    def __init__(self, replays: Sequence[Replay], weights: Sequence[float]) -> None:
        self._replays = tuple(replays)
        self._weights = tuple(weights)
        self._n = max(replay.shape[0] for replay in replays)
        self.y = self._sum([replay.y for replay in replays])
        self.offset = self._sum([replay.offset for replay in replays])
        self.last_term = self._sum([_last_term(replay) for replay in replays])

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d), with n that of the longest text."""
        return self._n, self._replays[0].shape[1]

    def jvp(self, tangents: torch.Tensor) -> torch.Tensor:
        """J V, shape (l, d), for V (l, n, d)."""
        return self._sum([replay.jvp(tangents[:, self._n - replay.shape[0] :]) for replay in self._replays])

    def vjp(self, cotangents: torch.Tensor) -> torch.Tensor:
        """J^T U, shape (l, n, d), for U (l, d)."""
        products = cotangents.new_zeros(len(cotangents), *self.shape)
        for replay, weight in zip(self._replays, self._weights, strict=True):
            products[:, self._n - replay.shape[0] :].add_(replay.vjp(cotangents), alpha=weight)
        return products

    def substitute_base(self, basis: torch.Tensor | None) -> torch.Tensor:
        """b = y - U U^T sum_t w_t J^t_{n-1} x^t_{n-1}, shape (d,), for ``basis`` U (d, r); None means U = 1."""
        last = self.last_term
        return self.y - (last if basis is None else basis @ (basis.T @ last))

    def _sum(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        terms = [weight * value for weight, value in zip(self._weights, values, strict=True)]
        return torch.stack(terms).sum(0)


def _last_term(replay: Replay) -> torch.Tensor:
    """J_{n-1} x_{n-1}, shape (d,)."""
    only_last = torch.zeros_like(replay.x)
    only_last[-1] = replay.x[-1]
    return replay.jvp(only_last[None])[0]
