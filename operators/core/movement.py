"""How far hidden states were moved, as found where they were moved: apart from what moved them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

_FLOAT32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class Movement:
    """Of each hidden state h that was to become h' = h + |h| push. Filled by :func:`movement`; shapes (...) float32."""

    dose: torch.Tensor
    """|h' - h|/|h|, of what arrived."""
    due: torch.Tensor
    """|push|: the dose that was to be given."""
    rounding: torch.Tensor
    """The most by which rounding h' to its dtype changes the dose: u |h'|/|h|, with u half the dtype's resolution."""


def join_movements(parts: Sequence[Movement]) -> Movement:
    """Those of hidden states that were moved in several parts, (T,) each, in their order."""
    if len(parts) == 1:
        return parts[0]
    names = [each.name for each in fields(Movement)]
    return Movement(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def movement(
    before: torch.Tensor, after: torch.Tensor, push: torch.Tensor, residual: torch.Tensor | None = None
) -> Movement:
    """What became of hidden states, without regard to how.

    Args:
        before: (..., d) in the model's dtype.
        after: (..., d), what stands in their place.
        push: (..., d) float32, in units of |h|.
        residual: (..., d), where a model hands the hidden state on in two parts: h = before + residual.
    """
    # Rounding errs by half a unit in the last place of each number of h', whatever part of h that is. In float64 the
    # sum was made in float32.
    unit = (max(torch.finfo(after.dtype).eps, _FLOAT32) + _FLOAT32) / 2.0
    start, end = before.to(torch.float32), after.to(torch.float32)
    whole = start if residual is None else start + residual.to(torch.float32)
    # A hidden state of zero is not moved: its dose is 0, not 0/0. What is not finite stays so.
    norm = torch.linalg.vector_norm(whole, dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    moved, length, due = (torch.linalg.vector_norm(each, dim=-1) for each in (end - start, end, push))
    return Movement(moved / norm, due, unit * length / norm)
