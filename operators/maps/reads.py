"""What an operator reads: its matrices seen from the side of the embeddings that they take.

For an operator with J_i = U B_i (U = 1 for an exact one), anchor y and offset c,

    w = J_{n-1}^T y/|y|,            so that w . x = (J_{n-1} x) . y/|y|

is how far a token with embedding x, in the concept's last place, moves the result along the concept. And

    t_k = J_{n-m+k} x_k,            k = 0..m-1

is what each token of a text of m tokens contributes; texts are right-aligned. For an operator of one text,
sum_k t_k + c = y up to its rank's residual, and the shares (t_k . y)/|y|^2 with that of c add up to 1. An operator of
several texts is their mean: its terms are what the mean makes of a text, and add up to y for none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TermSize:
    """One term J_i x_i against y. Filled by :func:`term_sizes`."""

    norm: float
    """|J_i x_i|, in the units of the hidden state."""
    cosine: float
    """Between J_i x_i and y; 0 where one of them is zero."""
    share: float
    """(J_i x_i . y)/|y|^2, dimensionless."""


def read_direction(factors: torch.Tensor, basis: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
    """w = J_{n-1}^T y/|y|, shape (d,), in float64, for ``factors`` (n, r, d), ``basis`` (d, r) or None and ``y`` (d,).

    Raises:
        ZeroDivisionError: y is zero, and has no direction.
    """
    y = y.double()
    norm = float(torch.linalg.vector_norm(y))
    if norm == 0:
        raise ZeroDivisionError("y is zero; an anchor with a direction is needed")
    unit = y / norm
    return factors[-1].double().T @ (unit if basis is None else basis.double().T @ unit)


def concept_terms(factors: torch.Tensor, basis: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """t_k = J_{n-m+k} x_k, shape (m, d), in float64, for ``factors`` (n, r, d) and a text's ``x`` (m, d), m <= n."""
    own = factors[len(factors) - len(x) :].double()
    terms = torch.einsum("krd,kd->kr", own, x.double())
    return terms if basis is None else terms @ basis.double().T


def term_sizes(terms: torch.Tensor, y: torch.Tensor) -> list[TermSize]:
    """Norm, cosine with ``y`` (d,) and share of each of the ``terms`` (m, d)."""
    terms, y = terms.double(), y.double()
    norms, length = torch.linalg.vector_norm(terms, dim=1), torch.linalg.vector_norm(y)
    along = terms @ y
    product = norms * length
    cosines = torch.where(product > 0, along / product.clamp_min(torch.finfo(product.dtype).tiny), 0.0)
    shares = along / length.pow(2)
    return [TermSize(*row) for row in torch.stack([norms, cosines, shares], 1).tolist()]
