"""Singular values and vectors of a position's map, and its stable rank.

    J = sum_k sigma_k u_k v_k^T,        stable rank = |J|_F^2 / sigma_1^2

The stable rank counts the directions that matter: it is 1 for a map of one direction and d for a rotation; a map that
is zero has none. :func:`full_spectrum` decomposes a dense map, :func:`leading_triplets` finds the first triplets of
one, and :func:`sketched_spectra` those of all positions from products with a replay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from operators.analyse.threads import one_thread
from operators.maps.replay import VECTORS_PER_PASS, Replay

_BLOCK = 8
"""Columns of one block of the Krylov space."""
_DEPTH = 6
"""Blocks of the Krylov space."""
_PROBES = 32
"""Gaussian cotangents that estimate what a sketched space leaves of |J_i|_F^2."""
_OVERLAP = 1e-4
"""Eigenvalue of S S^T (a squared sine) below which a row of S is taken to lie in the span of the others."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """sigma (k,), descending; u and v as rows (k, d); |J|_F^2. Tensors are at least float32. Filled by this module."""

    values: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    squared_norm: float

    @property
    def stable_rank(self) -> float | None:
        """|J|_F^2 / sigma_1^2, None where J is zero."""
        top = float(self.values[0])
        return self.squared_norm / top**2 if top > 0 else None

    def facing(self, x: torch.Tensor) -> Spectrum:
        """The same triplets, each pair (u, v) with the sign for which v . x >= 0, so that J x moves along +u."""
        signs = torch.where(self.right @ x.to(self.right) < 0, -1.0, 1.0)[:, None]
        return Spectrum(self.values, self.left * signs, self.right * signs, self.squared_norm)


@one_thread()
def full_spectrum(matrix: torch.Tensor) -> Spectrum:
    """All triplets of J (d, d)."""
    wide = _at_least_float32(matrix)
    left, values, right = torch.linalg.svd(wide)
    return Spectrum(values, left.T, right, float(wide.double().pow(2).sum()))


@one_thread()
def leading_triplets(matrix: torch.Tensor, rank: int, *, seed: int = 0) -> Spectrum:
    """The ``rank`` leading triplets of J (d, d), by block Krylov iteration (Musco and Musco 2015).

    They are the best in the span of (J^T J)^j W, j < 6, for W of 8 Gaussian columns, orthonormalised at each step.
    Singular values are never too large; they are accurate to better than 1 % whatever the gaps, and to rounding where
    the spectrum decays.
    """
    wide = _at_least_float32(matrix)
    generator = torch.Generator(wide.device).manual_seed(seed)
    columns = min(max(_BLOCK, rank), wide.shape[1])
    test = torch.randn(wide.shape[1], columns, generator=generator, dtype=wide.dtype, device=wide.device)
    blocks = [torch.linalg.qr(test).Q]
    for _ in range(min(_DEPTH, wide.shape[1] // columns) - 1):
        blocks.append(torch.linalg.qr(wide.T @ (wide @ blocks[-1])).Q)
    basis = torch.linalg.qr(torch.cat(blocks, 1)).Q
    left, values, inner = torch.linalg.svd(wide @ basis, full_matrices=False)
    right = inner @ basis.T
    return Spectrum(values[:rank], left.T[:rank], right[:rank], float(wide.double().pow(2).sum()))


def sketched_spectra(replay: Replay, rank: int, *, columns: int = 12, seed: int = 0) -> list[Spectrum]:
    """The ``rank`` leading triplets of every position's J_i, without forming it.

    The space that they are found in is that of two steps of the iteration in :func:`leading_triplets`, begun with
    V_0 = orth(J_i^T W) for W of ``columns`` random columns:

        V_1 = orth(J_i^T orth(J_i V_0)),        space = span [V_0, V_1]

    |J_i|_F^2 is what the space holds, |J_i [V_0 V_1]|_F^2, and an estimate of what it leaves, from 32 Gaussian g:
    E |g^T J_i (1 - V V^T)|^2.

    Where the spectrum is flat, sigma_1 comes out a percent too small and the stable rank about five percent too large.

    Cost: 2 n ``columns`` JVPs and n ``columns`` VJPs of single positions, ``columns`` + 32 VJPs of all.
    """
    n, d = replay.shape
    columns = min(columns, d)
    generator = torch.Generator(replay.x.device).manual_seed(seed)
    random = torch.randn(columns + _PROBES, d, generator=generator, dtype=replay.x.dtype, device=replay.x.device)
    products = _PositionProducts(replay, n * columns)
    positions = torch.arange(n, device=replay.x.device).repeat_interleave(columns)
    random_rows = products.vjp_at_all(random)
    spaces = [_orthonormal_rows(random_rows[:columns].transpose(0, 1))]
    outputs = [products.jvp(spaces[0].flatten(0, 1), positions)]
    rows = products.vjp(_orthonormal_rows(outputs[0].view(n, columns, d)).flatten(0, 1), positions)
    spaces.append(_orthonormal_rows(rows.view(n, columns, d)))
    outputs.append(products.jvp(spaces[1].flatten(0, 1), positions))
    space = _at_least_float32(torch.cat(spaces, 1))
    output = _at_least_float32(torch.cat([each.view(n, columns, d) for each in outputs], 1))
    probes = _at_least_float32(random_rows[columns:])
    return [_best_triplets(space[i], output[i], probes[:, i], rank) for i in range(n)]


@one_thread()
def _best_triplets(space: torch.Tensor, outputs: torch.Tensor, probes: torch.Tensor, rank: int) -> Spectrum:
    """The best triplets of J in the span of ``space``, its rows v (l, d).

    ``outputs`` (l, d) are J v; ``probes`` (m, d) are g^T J for Gaussian g.
    """
    # The rows of two steps may overlap. An orthonormal basis is T S, with T from the eigenvectors of S S^T; J of its
    # rows is T times the outputs.
    values, vectors = torch.linalg.eigh((space @ space.T).double())
    kept = values > _OVERLAP
    transform = (vectors[:, kept] / values[kept].sqrt()).T.to(space.dtype)
    basis, outputs = transform @ space, transform @ outputs
    inner, sigma, left = torch.linalg.svd(outputs, full_matrices=False)
    outside = probes - probes @ basis.T @ basis
    squared = float(outputs.double().pow(2).sum() + outside.double().pow(2).sum(1).mean())
    return Spectrum(sigma[:rank], left[:rank], (inner.T @ basis)[:rank], squared)


class _PositionProducts:
    """J_i v and J_i^T u of single positions, from products of the whole map, in groups of even size."""

    def __init__(self, replay: Replay, expected: int) -> None:
        self._replay = replay
        self._group = math.ceil(expected / math.ceil(expected / VECTORS_PER_PASS))

    def jvp(self, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """J_i v, shape (l, d), for vectors v (l, d) and the position i (l,) of each."""
        n = self._replay.shape[0]
        groups = zip(torch.split(vectors, self._group), torch.split(positions, self._group), strict=True)
        return torch.cat([self._replay.jvp(_at_positions(group, places, n)) for group, places in groups])

    def vjp(self, cotangents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """J_i^T u, shape (l, d), for cotangents u (l, d) and the position i (l,) of each."""
        groups = zip(torch.split(cotangents, self._group), torch.split(positions, self._group), strict=True)
        return torch.cat([self._replay.vjp(group)[range(len(group)), places] for group, places in groups])

    def vjp_at_all(self, cotangents: torch.Tensor) -> torch.Tensor:
        """J^T u at all positions, shape (l, n, d), for cotangents u (l, d)."""
        return torch.cat([self._replay.vjp(group) for group in torch.split(cotangents, self._group)])


def _at_positions(vectors: torch.Tensor, positions: torch.Tensor, n: int) -> torch.Tensor:
    """Tangents (l, n, d) that are zero everywhere but at the position of each of the vectors (l, d)."""
    tangents = vectors.new_zeros(len(vectors), n, vectors.shape[1])
    tangents[range(len(vectors)), positions] = vectors
    return tangents


def _orthonormal_rows(rows: torch.Tensor) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(_at_least_float32(rows).mT).Q
    return basis.mT.to(rows.dtype)


def _at_least_float32(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
