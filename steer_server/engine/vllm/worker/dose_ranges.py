"""Which positions of a request are pushed at a layer, and by how much the hidden states may move there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steer_server.engine.dose import dose_floor, dose_limit
from steer_server.engine.vllm.worker_protocol import OperatorSetting


@dataclass(frozen=True)
class DoseRange:
    """The positions from ``start`` up to, not including, ``end``, which the same operators push; None: no end."""

    start: int
    end: int | None
    floor: float
    """Every dose must be above it."""
    limit: float
    """No dose may be above it."""

    def overlap(self, first: int, end: int) -> tuple[int, int]:
        """[from, to) of the positions ``first`` to ``end`` - 1 that are in this range; empty where from >= to."""
        return max(first, self.start), end if self.end is None else min(end, self.end)


def dose_ranges(settings: Sequence[OperatorSetting], dtype: torch.dtype) -> tuple[DoseRange, ...]:
    """The ranges of one layer, in their order, from the operators of one request that push it.

    ``dtype``: of the hidden states. Positions that no operator pushes are in no range.
    """
    starts = {setting.start for setting in settings}
    cuts = sorted(starts | {setting.end for setting in settings if setting.end is not None})
    ranges = []
    for start, end in zip(cuts, [*cuts[1:], None], strict=True):
        # Between two cuts no operator begins or ends.
        pushing = [one for one in settings if one.start <= start and (one.end is None or start < one.end)]
        bound = sum(abs(setting.strength) / 2.0 for setting in pushing)
        if pushing:
            ranges.append(DoseRange(start, end, dose_floor(bound), dose_limit(bound, dtype)))
    return tuple(ranges)


def first_due(ranges: Sequence[DoseRange], first: int, end: int) -> tuple[int, int] | None:
    """[from, to) of the first positions among ``first`` to ``end`` - 1 that are pushed; None where none is."""
    overlaps = (one.overlap(first, end) for one in ranges)
    return next(((start, stop) for start, stop in overlaps if start < stop), None)


def check_doses(ranges: Sequence[DoseRange], first: int, doses: Sequence[float]) -> str:
    """What is wrong with the doses of consecutive positions from ``first`` on, all of them pushed; or nothing."""
    for one in ranges:
        start, end = one.overlap(first, first + len(doses))
        for dose in doses[start - first : max(end, start) - first]:
            # Negated, so that NaN is wrong as well.
            if not one.floor < dose <= one.limit:
                return (
                    f"the hidden state moved by {dose:g} of its norm; a positive change of at most {one.limit:g} is "
                    "what the strengths give (they may cancel, or be lost in rounding to the model's dtype)"
                )
    return ""
