"""The pushes of a plan, worked out from token ids once more: what is measured is held against them.

Nothing here is shared with what pushes (:mod:`operators.core.apply`, the engines): the equation is written down again,
position by position and from the artifact's own numbers, so that a fault there is not repeated here.

    push_k = sum over the operators of (lambda/2) d_k/|d_k|
    d_k = (1-beta) a_k/|a_k| + beta z/|z|,  beta = 1 at k = 0 where the setting puts the anchor there
    cumulative  a_k = c + U sum over i < n of B_i (sum of x_j, j <= k and j mod n = i)
    substitute  a_k = b + U B_{n-1} x_k
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from operators.core.positions import Positions
from steer_server.types import Application, SteeringPlan

EmbedIds = Callable[[Sequence[int], int], torch.Tensor]
"""``embed(ids, first)``: the embeddings (T, d) float64 on the CPU of tokens at the positions first, first + 1, ..., as
the model's first block receives them."""


class EmbeddingRows:
    """The embeddings of a model in transformers: an :data:`EmbedIds`. Keeps its embedding table and nothing else."""

    def __init__(self, model: Any) -> None:
        self._table = model.get_input_embeddings()
        decoder = model.get_decoder()
        self._learned, self._scale = getattr(decoder, "wpe", None), getattr(decoder, "embedding_multiplier", 1.0)

    def __call__(self, ids: Sequence[int], first: int) -> torch.Tensor:
        """See :data:`EmbedIds`."""
        with torch.inference_mode():
            x: torch.Tensor = self._table(torch.tensor(ids, device=self._table.weight.device)) * self._scale
            if self._learned is not None:
                x = x + self._learned.weight[first : first + len(ids)]
            return x.to(device="cpu", dtype=torch.float64)


class ReferencePushes:
    """The pushes along one text. Cheapest where positions are asked for in their order."""

    def __init__(self, plan: SteeringPlan, embed: EmbedIds, *, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._directions = [
            (use, _ReferenceDirection(use, embed)) for use in plan.applications if use.setting.strength != 0.0
        ]

    def at(self, layer: int, position: int, ids: Sequence[int]) -> torch.Tensor | None:
        """The push (d,) float64 in units of |h| at a layer and position k, or None where no operator pushes.

        ``ids``: of the text, up to and including position k.
        """
        pushes = [
            use.setting.strength / 2.0 * direction.at(position, ids)
            for use, direction in self._directions
            if use.layer == layer and is_pushed(use.setting.positions, position, self._prompt_tokens)
        ]
        return sum(pushes[1:], start=pushes[0]) if pushes else None


def is_pushed(positions: Positions, position: int, prompt_tokens: int) -> bool:
    """Whether a position of a text is among ``positions``."""
    number = position - prompt_tokens if positions.part == "generated" else position
    if positions.part == "prompt" and position >= prompt_tokens:
        return False
    return number >= positions.start and (positions.end is None or number < positions.end)


class _ReferenceDirection:
    """d_k/|d_k| of one operator along one text."""

    def __init__(self, use: Application, embed: EmbedIds) -> None:
        self._artifact, self._setting, self._embed = use.artifact, use.setting, embed
        self._num_summed = 0
        self._sums = torch.zeros(self._artifact.factors.shape[0], self._artifact.anchor.shape[0], dtype=torch.float64)
        """Of each block i, the sum (d,) of the embeddings that it multiplies."""
        z = use.artifact.anchor.double()
        if use.setting.anchor == "contrast" and use.artifact.neutral is not None:
            z = z - use.artifact.neutral.double()
        self._unit_anchor = _unit(z)

    def at(self, k: int, ids: Sequence[int]) -> torch.Tensor:
        """(d,) float64. Without meaning, and not finite, where the direction does not exist."""
        setting = self._setting
        if setting.blend == 1.0 or (k == 0 and setting.first_token == "anchor"):
            return self._unit_anchor
        a = self._substitute(k, ids) if setting.rule == "substitute" else self._cumulative(k, ids)
        return _unit((1.0 - setting.blend) * _unit(a) + setting.blend * self._unit_anchor)

    def _substitute(self, k: int, ids: Sequence[int]) -> torch.Tensor:
        products = _products(self._artifact.factors[-1:], self._embed(ids[k : k + 1], k))
        return self._artifact.substitute_base.double() + self._expand(products[0])

    def _cumulative(self, k: int, ids: Sequence[int]) -> torch.Tensor:
        n = self._sums.shape[0]
        if self._num_summed > k + 1:
            self._sums.zero_()
            self._num_summed = 0
        if self._num_summed <= k:
            x = self._embed(ids[self._num_summed : k + 1], self._num_summed)
            self._sums.index_add_(0, torch.arange(self._num_summed, k + 1) % n, x)
            self._num_summed = k + 1
        used = min(n, k + 1)
        products = _products(self._artifact.factors[:used], self._sums[:used])
        a = self._expand(products.sum(0))
        return a if self._artifact.offset is None else a + self._artifact.offset.double()

    def _expand(self, coefficients: torch.Tensor) -> torch.Tensor:
        basis = self._artifact.basis
        return coefficients if basis is None else _products(basis[None], coefficients[None])[0]


def _products(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """(N, r) float64: of N matrices (N, r, d) each with a vector of (N, d).

    In the matrices' precision, float32 at least: to convert an exact operator takes longer than to multiply it.
    """
    dtype = torch.promote_types(matrices.dtype, torch.float32)
    pairs = zip(matrices, vectors.to(dtype), strict=True)
    return torch.stack([matrix.to(dtype) @ vector for matrix, vector in pairs]).double()


def _unit(vector: torch.Tensor) -> torch.Tensor:
    unit: torch.Tensor = vector / vector.norm()
    return unit
