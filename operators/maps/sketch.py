"""A low-rank approximation of all positions at once, from a joint sketch.

All positions share the left space: with J = [J_0 ... J_{n-1}] (d, n d), U (d, r) orthonormal and B_i = U^T J_i (r, d),

    J_i  ~  U B_i.

Weighting. The operator only ever multiplies token embeddings, so what should be small is (J - U B) C^{1/2}, with C the
second moment of the embedding table (or C = 1, "white"). For C^{1/2} any R with R R^T = C will do: (J R)(J R)^T is the
same, and so are the norm, the range and the singular values of J R. It is Cholesky's factor where C has one.

Range. With l = min(r + OVERSAMPLE, d) Gaussian columns G (d, l) and q power iterations, the range of J C^{1/2} is
approximated by that of

    (J C J^T)^q G,

orthonormalised by QR after every half step (subspace iteration; Halko, Martinsson and Tropp 2011, algorithm 4.4, begun
on the left side, which has d rows and not n d). B is one more VJP of the basis.

Products with weights may be made in bfloat16 for this (``rounded_to``), but for the last VJP: they decide which range
is found, and how good it is the certificate says, which is of the last VJP. Where a tolerance is asked for, they are
not: it may be below what bfloat16 resolves.

Anchor. y - c is the first vector of the basis, whatever the rank, so that for the map of one text
U sum_i B_i x_i + c = y up to rounding.

Certificate. PROBES of the cotangents of the last VJP are Gaussian and orthogonal to the basis Q: for such g,
E |J_i^T g|^2 = |(1 - Q Q^T) J_i|_F^2. The residual is thus sampled itself, and is no difference of two large numbers.
Where a tolerance is asked for, there are TOLERANCE_PROBES of them, MARGIN standard errors of their mean are added, and
the basis is ordered by what its vectors hold of J, which is what the tolerance measures.

When it is good: the error is near the least possible where the singular values of J C^{1/2} decay beyond r; where they
are flat, no rank-r matrix is close, and the residual says so.

Cost: l (1 + 2q) + PROBES products whatever n is, and a few arrays (l, n, d) of memory (``builder.memory`` counts them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from operators.core.errors import BuildError
from operators.maps.detach import products_in
from operators.maps.replay import AffineMap

OVERSAMPLE = 12
"""l - r: columns of the sketch beyond the rank."""
POWER_ITERATIONS = 1
"""q. With one, the error is at most 1.2 times the least of any matrix of that rank (the tests hold it to that)."""
PROBES = 8
"""Random cotangents of the certificate: its relative error is about sqrt(2/PROBES) over the residual's rank."""

TOLERANCE_POWER_ITERATIONS = 2
"""q where a tolerance is asked for: with one, the rank would be some percent above what it takes."""
TOLERANCE_PROBES = 64
"""Those of a certificate that a tolerance is held against."""
MARGIN = 2.5
"""Standard errors of the probes' mean that a tolerance leaves room for."""

FIRST_RANK = 32
"""The first rank that is tried for a tolerance; each further one is twice the last."""

TABLE_ROWS_AT_ONCE = 1 << 14
"""Rows of the embedding table that are held in float64 at a time."""

_Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class LowRankMap:
    """J_i ~ U B_i, and what it leaves out. Filled by :func:`sketch`.

    Attributes:
        basis: U (d, r), orthonormal; its first column is parallel to y - c.
        factors: B (n, r, d).
        residuals: |J_i - U B_i|_F / |J_i|_F per position, as the probes measured it; 0 where J_i is zero.
        residual: |J - U B|_F / |J|_F of all positions together.
        singular_values: (l,), those of Q^T J C^{1/2} for the basis Q before truncation, descending.
    """

    basis: torch.Tensor
    factors: torch.Tensor
    residuals: tuple[float, ...]
    residual: float
    singular_values: torch.Tensor


def num_products(rank: int, d: int, *, power_iterations: int = POWER_ITERATIONS, probes: int = PROBES) -> int:
    """l (1 + 2q) + probes: the JVPs and VJPs of a sketch of this rank, certificate included."""
    return _num_columns(rank, d) * (1 + 2 * power_iterations) + probes


def sketch(
    affine_map: AffineMap,
    rank: int,
    *,
    root: torch.Tensor | None,
    power_iterations: int = POWER_ITERATIONS,
    seed: int = 0,
    rounded_to: torch.dtype | None = None,
) -> LowRankMap:
    """The map approximated with ``rank``.

    Args:
        root: C^{1/2} (d, d) of :func:`embedding_root`; None for white test vectors (C = 1).
        rounded_to: the dtype of the range's products with weights; None means that of the map.

    Raises:
        ValueError: the rank is not from 1 to d.
    """
    _, d = affine_map.shape
    if not 1 <= rank <= d:
        raise ValueError(f"rank is {rank}; 1 to {d} are accepted")
    return _truncate(_sketch(affine_map, rank, root, power_iterations, seed, rounded_to=rounded_to), rank)


def sketch_within(
    affine_map: AffineMap,
    tolerance: float,
    *,
    root: torch.Tensor | None,
    seed: int = 0,
    check_rank: Callable[[int], None] | None = None,
) -> LowRankMap | None:
    """The map approximated with the smallest rank whose residual |J - U B|_F / |J|_F is at most ``tolerance``.

    None where that takes no fewer numbers than the exact operator. Ranks are tried from FIRST_RANK on by doubling, each
    with a sketch of its own, and the first sufficient one is truncated.

    Args:
        root: C^{1/2} (d, d) of :func:`embedding_root`; None for white test vectors (C = 1).
        check_rank: called with every rank before it is tried; may raise to end the search.

    Raises:
        ValueError: the tolerance is not between 0 and 1.
    """
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance is {tolerance}; a number between 0 and 1 is accepted")
    n, d = affine_map.shape
    rank = min(FIRST_RANK, d)
    while True:
        if check_rank is not None:
            check_rank(rank)
        sketched = _sketch(
            affine_map, rank, root, TOLERANCE_POWER_ITERATIONS, seed, probes=TOLERANCE_PROBES, by_weight=False
        )
        for sufficient in range(1, rank + 1):
            if sketched.residual(sufficient, margin=MARGIN) <= tolerance:
                return _truncate(sketched, sufficient) if sufficient * (n + 1) < n * d else None
        if rank == d:
            # The full rank leaves nothing out, so that this is reached only where its residual is not a number.
            return None
        rank = min(2 * rank, d)


def embedding_root(table: torch.Tensor) -> torch.Tensor:
    """R (d, d) in float64 with R R^T = C, for C = E x x^T over the rows x of ``table`` (V, d), scaled to unit mean
    variance: lower triangular, or symmetric where C is singular.

    Sums over a table that is not float64 are float32's: they weigh what a sketch approximates, and no value of a map.

    Raises:
        BuildError: the table has values that are not finite.
    """
    moment = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64, device=table.device)
    for rows in torch.split(table, TABLE_ROWS_AT_ONCE):
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        moment += wide.T @ wide
    moment /= len(table)
    if not bool(torch.isfinite(moment).all()):
        raise BuildError("the embedding table has values that are not finite; a sketch cannot be weighted with it")
    factor, failed = torch.linalg.cholesky_ex(moment)
    root: torch.Tensor = factor if not int(failed) else _symmetric_root(moment)
    return root / math.sqrt(float(moment.diagonal().mean()))


def _symmetric_root(moment: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(moment)
    root: torch.Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root


@dataclass(frozen=True, eq=False)
class _Sketch:
    """Q^T and Q^T J before truncation, rows by descending importance.

    ``basis`` (l, d); ``factors`` (l, n, d); ``squares`` (l, n), the squared norm of each row of ``factors``;
    ``outside`` (n,), |(1 - Q Q^T) J_i|_F^2; ``outside_error``, the standard error of its sum.
    """

    basis: torch.Tensor
    factors: torch.Tensor
    squares: torch.Tensor
    outside: torch.Tensor
    outside_error: float
    singular_values: torch.Tensor

    def squared_errors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """|J_i - U B_i|_F^2 and |J_i|_F^2 per position, (n,) each, for the first ``rank`` rows."""
        return self.outside + self.squares[rank:].sum(0), self.outside + self.squares.sum(0)

    def residual(self, rank: int, *, margin: float = 0.0) -> float:
        """|J - U B|_F / |J|_F of all positions together, for the first ``rank`` rows.

        ``margin``: standard errors by which what is outside may be larger than the probes say.
        """
        errors, totals = self.squared_errors(rank)
        more = margin * self.outside_error
        return math.sqrt((float(errors.sum()) + more) / (float(totals.sum()) + more))


def _sketch(
    affine_map: AffineMap,
    rank: int,
    root: torch.Tensor | None,
    power_iterations: int,
    seed: int,
    *,
    probes: int = PROBES,
    by_weight: bool = True,
    rounded_to: torch.dtype | None = None,
) -> _Sketch:
    """``by_weight``: order the basis by what its vectors hold of J C^{1/2}, in place of J."""
    d = affine_map.shape[1]
    columns = _num_columns(rank, d)
    generator = torch.Generator(affine_map.y.device).manual_seed(seed)
    weight, weight_back = _weighting(root), _weighting(None if root is None else root.T)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=affine_map.y.dtype, device=affine_map.y.device)

    # The l columns of the equations are rows here: samples (l, d), products (l, n, d).
    samples = gaussian(columns, d)
    with products_in(rounded_to):
        for _ in range(power_iterations):
            products = weight(affine_map.vjp(_orthonormal_rows(samples)))
            samples = affine_map.jvp(weight_back(_orthonormal_rows(products.flatten(1)).view_as(products)))
            del products
    # y - c comes first, so that it survives any truncation.
    anchor = (affine_map.y - affine_map.offset)[None]
    leading = torch.linalg.svd(samples.T, full_matrices=False).U.T
    basis = _orthonormal_rows(torch.cat([anchor, leading]))[:columns]
    cotangents = gaussian(probes, d)
    for _ in range(2):
        # Projecting once leaves a rounding error inside the basis that can be as large as the residual itself.
        cotangents = cotangents - (cotangents @ basis.T) @ basis
    products = affine_map.vjp(torch.cat([basis, cotangents]))
    factors, probed = products[: len(basis)], products[len(basis) :].double().pow(2).sum(-1)
    # A basis of the whole space leaves nothing outside; its probes are rounding.
    probed = torch.zeros_like(probed) if len(basis) == d else probed
    return _ordered(basis, factors, probed, weight if by_weight else _weighting(None))


def _num_columns(rank: int, d: int) -> int:
    """l."""
    return min(rank + OVERSAMPLE, d)


def _ordered(basis: torch.Tensor, factors: torch.Tensor, probed: torch.Tensor, weight: _Transform) -> _Sketch:
    """The anchor's row first, then the others rotated to the left singular vectors of Q^T J C^{1/2}, descending."""
    weighted = weight(factors).flatten(1).double()
    singular_values = torch.linalg.eigvalsh(weighted @ weighted.T).clamp_min(0).sqrt().flip(0)
    _, vectors = torch.linalg.eigh(weighted[1:] @ weighted[1:].T)
    del weighted
    rotation = torch.zeros(len(basis), len(basis), dtype=torch.float64, device=basis.device)
    rotation[0, 0] = 1.0
    rotation[1:, 1:] = vectors.T.flip(0)
    rotation = rotation.to(basis.dtype)
    factors = torch.tensordot(rotation, factors, 1)
    # Row by row: all of them in float64 would be the largest array of a build.
    squares = torch.stack([row.double().pow(2).sum(-1) for row in factors])
    outside_error = float(probed.sum(-1).std()) / math.sqrt(len(probed))
    return _Sketch(rotation @ basis, factors, squares, probed.mean(0), outside_error, singular_values)


def _truncate(sketched: _Sketch, rank: int) -> LowRankMap:
    errors, totals = sketched.squared_errors(rank)
    # J_i = 0 where the attention windows end before position i: nothing of it is lost.
    residuals = torch.where(totals > 0, errors / totals, torch.zeros_like(totals)).sqrt()
    return LowRankMap(
        basis=sketched.basis[:rank].T.contiguous(),
        factors=sketched.factors[:rank].transpose(0, 1).contiguous(),
        residuals=tuple(residuals.tolist()),
        residual=sketched.residual(rank),
        singular_values=sketched.singular_values,
    )


def _orthonormal_rows(rows: torch.Tensor) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(rows.T).Q.T
    return basis


def _weighting(root: torch.Tensor | None) -> _Transform:
    """v -> R^T v on the last axis; the identity where ``root`` is None. Keeps ``root`` in the dtypes it met."""
    if root is None:
        return lambda vectors: vectors
    by_dtype: dict[torch.dtype, torch.Tensor] = {}

    def weight(vectors: torch.Tensor) -> torch.Tensor:
        if vectors.dtype not in by_dtype:
            by_dtype[vectors.dtype] = root.to(vectors.dtype)
        return vectors @ by_dtype[vectors.dtype]

    return weight
