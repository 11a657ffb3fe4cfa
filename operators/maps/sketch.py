"""A low-rank operator for every position at once, from a two-pass joint sketch.

All positions share the left space: with J = [J_0 ... J_{n-1}] (d, n d), an orthonormal U (d, r), B_i = U^T J_i (r, d),

    J_i  ~  U B_i.

The operator only ever multiplies token embeddings, so what should be small is (J - U B) C^{1/2}, C the second moment
of the embedding table. The range of J C^{1/2} is that of (J C J^T)^q G for l random columns G, with QR between half
steps (subspace iteration; Halko, Martinsson and Tropp 2011, algorithm 4.4, begun on the left side, which has d rows
and not n d), and B is one more pull: l (1 + 2q) products whatever n is. y - c is in the basis, so that
U sum B_i x_i + c = y at the concept of one text, at any rank.

Of the last l columns, PROBES ask for what the basis left out, so that the error comes with the operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from operators.core.errors import BuildError
from operators.maps.replay import Map

OVERSAMPLE = 12
POWER_ITERATIONS = 1
PROBES = 8
"""Random columns for the residual certificate: its relative error is about sqrt(2/PROBES) over the residual's rank."""

FIRST_RANK = 32
"""Where the search for a tolerance begins; it goes on by doubling."""

ROWS_AT_ONCE = 1 << 14
"""Rows of the embedding table that are in float64 at a time."""

Columns = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Reduced:
    """U (d, r), B (n, r, d), and the relative residual |J_i - U B_i|_F / |J_i|_F per position.

    ``singular_values``: (r + OVERSAMPLE,), those of J C^{1/2} as the sketch sees them, descending. ``residual`` is that
    of all positions together.
    """

    basis: torch.Tensor
    factors: torch.Tensor
    residuals: tuple[float, ...]
    residual: float
    singular_values: torch.Tensor


def num_products(rank: int, d: int, *, power_iterations: int = POWER_ITERATIONS) -> int:
    """l (1 + 2q) and PROBES: the products that a sketch of this rank takes, certificate included."""
    columns = _columns(rank, d)
    return columns * (1 + 2 * power_iterations) + PROBES


def sketch(
    concept: Map,
    rank: int,
    *,
    root: torch.Tensor | None,
    power_iterations: int = POWER_ITERATIONS,
    seed: int = 0,
) -> Reduced:
    """The map of one concept, reduced to ``rank``.

    Args:
        root: C^{1/2} (d, d), symmetric; None for white test vectors (C = 1).

    Raises:
        ValueError: the rank is not from 1 to d.
    """
    _, d = concept.shape
    if not 1 <= rank <= d:
        raise ValueError(f"rank is {rank}; 1 to {d} are accepted")
    return _truncated(_sketched(concept, rank, root, power_iterations, seed), rank)


def sketch_within(
    concept: Map,
    tolerance: float,
    *,
    root: torch.Tensor | None,
    seed: int = 0,
    check: Callable[[int], None] | None = None,
) -> Reduced | None:
    """The map reduced to the smallest rank whose residual |J - U B|_F / |J|_F is at most ``tolerance``.

    None where that would be no smaller than the exact operator. ``check`` is asked about every rank that is about to be
    tried, and may raise.

    Raises:
        ValueError: the tolerance is not between 0 and 1.
    """
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance is {tolerance}; a number between 0 and 1 is accepted")
    n, d = concept.shape
    rank = min(FIRST_RANK, d)
    while True:
        if check is not None:
            check(rank)
        found = _sketched(concept, rank, root, POWER_ITERATIONS, seed)
        for enough in range(1, rank + 1):
            if found.residual(enough) <= tolerance:
                return _truncated(found, enough) if enough * (n + 1) < n * d else None
        if rank == d:
            # Nothing is left out at the full rank: what is not reached has no number for an error.
            return None
        rank = min(2 * rank, d)


def embedding_root(table: torch.Tensor) -> torch.Tensor:
    """C^{1/2} (d, d) in float64 of the table's second moment C = E x x^T, scaled to unit mean variance.

    Raises :class:`BuildError` for a table with values that are not finite.
    """
    moment = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64, device=table.device)
    for rows in torch.split(table, ROWS_AT_ONCE):
        wide = rows.double()
        moment += wide.T @ wide
    moment /= len(table)
    if not bool(torch.isfinite(moment).all()):
        raise BuildError("the embedding table has values that are not finite; a sketch cannot be weighted with it")
    values, vectors = torch.linalg.eigh(moment)
    root: torch.Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root / math.sqrt(float(moment.diagonal().mean()))


@dataclass(frozen=True, eq=False)
class _Sketch:
    """Rows ordered by what they carry: ``basis`` (m, d), ``factors`` (m, n, d).

    ``carried`` (m, n): |row of B_i|^2. ``left`` (n,): |J_i|_F^2 beyond all rows.
    """

    basis: torch.Tensor
    factors: torch.Tensor
    carried: torch.Tensor
    left: torch.Tensor
    singular_values: torch.Tensor

    def squares(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """|J_i - U B_i|_F^2 and |J_i|_F^2 per position, (n,) each, for the first ``rank`` rows."""
        return self.left + self.carried[rank:].sum(0), self.left + self.carried.sum(0)

    def residual(self, rank: int) -> float:
        """Of all positions together."""
        lost, total = self.squares(rank)
        return math.sqrt(float(lost.sum() / total.sum()))


def _sketched(concept: Map, rank: int, root: torch.Tensor | None, power_iterations: int, seed: int) -> _Sketch:
    d = concept.shape[1]
    columns = _columns(rank, d)
    generator = torch.Generator(concept.y.device).manual_seed(seed)
    weigh = _weigher(root)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=concept.y.dtype, device=concept.y.device)

    images = draw(columns, d)
    for _ in range(power_iterations):
        pulled = weigh(concept.pull(_orthonormal_rows(images)))
        images = concept.push(weigh(_orthonormal_rows(pulled.flatten(1)).view_as(pulled)))
    # The concept's own point comes first, so that it survives any truncation.
    anchor = (concept.y - concept.offset)[None]
    leading = torch.linalg.svd(images.T, full_matrices=False).U.T
    basis = _orthonormal_rows(torch.cat([anchor, leading]))[:columns]
    probes = draw(PROBES, d)
    for _ in range(2):
        # Once leaves rounding of the size of what may be left.
        probes = probes - (probes @ basis.T) @ basis
    answers = concept.pull(torch.cat([basis, probes]))
    factors, left = answers[: len(basis)], answers[len(basis) :].double().pow(2).sum(-1)
    # E |J_i^T g|^2 = |(1 - Q Q^T) J_i|_F^2 for Gaussian g made orthogonal to Q: the residual itself is sampled, not
    # a difference of two large numbers. Where Q is everything, nothing is left.
    complete = len(basis) == d
    return _ordered(basis, factors, torch.zeros_like(left[0]) if complete else left.mean(0), weigh)


def _columns(rank: int, d: int) -> int:
    return min(rank + OVERSAMPLE, d)


def _ordered(basis: torch.Tensor, factors: torch.Tensor, left: torch.Tensor, weigh: Columns) -> _Sketch:
    """The concept's direction first, then the others by their singular values."""
    weighed = weigh(factors).flatten(1).double()
    sigma = torch.linalg.eigvalsh(weighed @ weighed.T).clamp_min(0).sqrt().flip(0)
    _, vectors = torch.linalg.eigh(weighed[1:] @ weighed[1:].T)
    turn = torch.zeros(len(basis), len(basis), dtype=torch.float64, device=basis.device)
    turn[0, 0] = 1.0
    turn[1:, 1:] = vectors.T.flip(0)
    turn = turn.to(basis.dtype)
    factors = torch.tensordot(turn, factors, 1)
    return _Sketch(turn @ basis, factors, factors.double().pow(2).sum(-1), left, sigma)


def _truncated(found: _Sketch, rank: int) -> Reduced:
    lost, total = found.squares(rank)
    # A position that nothing reaches (a window shorter than the concept) has lost nothing.
    residuals = torch.where(total > 0, lost / total, torch.zeros_like(total)).sqrt()
    return Reduced(
        basis=found.basis[:rank].T.contiguous(),
        factors=found.factors[:rank].transpose(0, 1).contiguous(),
        residuals=tuple(residuals.tolist()),
        residual=found.residual(rank),
        singular_values=found.singular_values,
    )


def _orthonormal_rows(rows: torch.Tensor) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(rows.T).Q.T
    return basis


def _weigher(root: torch.Tensor | None) -> Columns:
    if root is None:
        return lambda columns: columns
    narrow: dict[torch.dtype, torch.Tensor] = {}

    def weigh(columns: torch.Tensor) -> torch.Tensor:
        if columns.dtype not in narrow:
            narrow[columns.dtype] = root.to(columns.dtype)
        return columns @ narrow[columns.dtype]

    return weigh
