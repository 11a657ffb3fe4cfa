"""Unit directions d_k along many texts at once: what a form of steering pushes with.

    h_k <- h_k + (lambda/2) |h_k| d_k        at the positions of the push

The equations are those of :mod:`operators.core.apply`, which steers one sequence; here R texts advance together, each
with its own position k, so that an evaluation fills a batch. Padding counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from operators.core.apply import PreparedOperator
from operators.core.errors import SteeringError
from operators.core.positions import ALL_POSITIONS, Positions

Part = Literal["stream", "values"]
"""What a push moves: the residual stream, or only the values that later tokens read of it (first token alone)."""


class Running(Protocol):
    """Directions along R texts under way. Feed it their tokens in order, each once."""

    def advance(self, x: torch.Tensor, positions: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """d_k (R, T, d) of the next T tokens: ``x`` (R, T, d) float32, ``positions`` and ``real`` (R, T).

        What it gives where ``real`` is false is not used.
        """
        ...


class Directions(Protocol):
    """What is pushed along, for texts of any number."""

    def begin(self, rows: int) -> Running:
        """Directions along ``rows`` new texts."""
        ...


@dataclass(frozen=True, eq=False)
class Push:
    """What a form does for one concept: along which directions, at which positions, to what."""

    directions: Directions
    positions: Positions = field(default=ALL_POSITIONS)
    part: Part = "stream"


@dataclass(frozen=True, eq=False)
class Constant:
    """One direction ``unit`` (d,) at every position, whatever the text."""

    unit: torch.Tensor

    def begin(self, rows: int) -> Running:  # noqa: ARG002 - the same for any number
        """Itself: it has no state."""
        return self

    def advance(self, x: torch.Tensor, positions: torch.Tensor, real: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """The direction (R, T, d), without a copy."""
        return self.unit.expand(x.shape)


def constant(vector: torch.Tensor, subject: str) -> Constant:
    """The direction of ``vector`` (d,). Raises :class:`SteeringError` naming ``subject`` where it has none."""
    wide = vector.to(torch.float32)
    norm = float(torch.linalg.vector_norm(wide))
    if not 0.0 < norm < float("inf"):
        raise SteeringError(f"{subject} has norm {norm:g}; a positive, finite one is needed")
    return Constant(wide / norm)


@dataclass(frozen=True, eq=False)
class OperatorDirections:
    """a_k of an operator, by either rule, mixed with an anchor, and with a direction of its own at the first token.

    d_k ~ (1-beta) a_k/|a_k| + beta ``anchor``; at position 0 ``first`` (d,) where there is one.
    """

    operator: PreparedOperator
    rule: Literal["cumulative", "substitute"] = "cumulative"
    blend: float = 0.0
    anchor: torch.Tensor | None = None
    first: torch.Tensor | None = None

    def begin(self, rows: int) -> Running:
        """New texts: their running sums are zero."""
        return _RunningOperator(self, rows)


class _RunningOperator:
    def __init__(self, form: OperatorDirections, rows: int) -> None:
        self._form = form
        factors = form.operator.factors
        self._n, self._rank, d = factors.shape
        self._flat = factors.reshape(-1, d)
        self._sums = factors.new_zeros(rows, self._rank)

    def advance(self, x: torch.Tensor, positions: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        form = self._form
        unit = normalised(self._cumulative(x, positions, real) if form.rule == "cumulative" else self._substitute(x))
        if form.blend:
            anchor = form.operator.unit_anchor if form.anchor is None else form.anchor
            unit = normalised((1.0 - form.blend) * unit + form.blend * anchor)
        if form.first is not None:
            unit = torch.where((positions == 0)[..., None], form.first, unit)
        return unit

    def _cumulative(self, x: torch.Tensor, positions: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """a_k = c + U s_k, s_k = sum_{j<=k} B_{j mod n} x_j: one product with all blocks, then each token's own."""
        products = (x @ self._flat.T).reshape(*x.shape[:2], self._n, self._rank)
        blocks = (positions % self._n)[..., None, None].expand(*x.shape[:2], 1, self._rank)
        terms = products.gather(2, blocks).squeeze(2) * real[..., None]
        sums = self._sums[:, None] + terms.cumsum(1)
        self._sums = sums[:, -1]
        offset = self._form.operator.offset
        return self._expand(sums) if offset is None else self._expand(sums) + offset

    def _substitute(self, x: torch.Tensor) -> torch.Tensor:
        """a_k = b + U B_{n-1} x_k."""
        return self._form.operator.base + self._expand(x @ self._form.operator.factors[-1].T)

    def _expand(self, coefficients: torch.Tensor) -> torch.Tensor:
        basis = self._form.operator.basis
        return coefficients if basis is None else coefficients @ basis.T


def normalised(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (..., d) over their norms; one of zero stays zero, and a push of it is refused where it is made."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    unit: torch.Tensor = vectors / norms.clamp_min(torch.finfo(torch.float32).tiny)
    return unit
