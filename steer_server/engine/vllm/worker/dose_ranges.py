"""Which positions of a request are pushed at a layer, and by how much the hidden states may move there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steer_server.engine.dose import DoseBounds
from steer_server.engine.vllm.worker_protocol import OperatorSetting


@dataclass(frozen=True)
class DoseRange:
    """The positions from ``start`` up to, not including, ``end``, which the same operators push; None: no end."""

    start: int
    end: int | None
    bounds: DoseBounds

    def overlap(self, first: int, end: int) -> tuple[int, int]:
        """[from, to) of the positions ``first`` to ``end`` - 1 that are in this range; empty where from >= to."""
        # Compared, not max and min: this is asked for every token that is pushed.
        return (
            self.start if self.start > first else first,
            end if self.end is None or self.end > end else self.end,
        )


def dose_ranges(settings: Sequence[OperatorSetting]) -> tuple[DoseRange, ...]:
    """The ranges of one layer, in their order, from the operators of one request that push it.

    Positions that no operator pushes are in no range.
    """
    starts = {setting.start for setting in settings}
    cuts = sorted(starts | {setting.end for setting in settings if setting.end is not None})
    ranges = []
    for start, end in zip(cuts, [*cuts[1:], None], strict=True):
        # Between two cuts no operator begins or ends.
        pushing = [one for one in settings if one.start <= start and (one.end is None or start < one.end)]
        if pushing:
            ranges.append(DoseRange(start, end, DoseBounds.of(setting.strength for setting in pushing)))
    return tuple(ranges)


def first_due(ranges: Sequence[DoseRange], first: int, end: int) -> tuple[int, int] | None:
    """[from, to) of the first positions among ``first`` to ``end`` - 1 that are pushed; None where none is."""
    overlaps = (one.overlap(first, end) for one in ranges)
    return next(((start, stop) for start, stop in overlaps if start < stop), None)


def check_movements(ranges: Sequence[DoseRange], first: int, moved: Sequence[Sequence[float]]) -> str:
    """What is wrong at consecutive positions from ``first`` on, all of them pushed; or nothing.

    Args:
        moved: of each, the arguments of :meth:`.DoseBounds.problem`.
    """
    for one in ranges:
        start, end = one.overlap(first, first + len(moved))
        for token in moved[start - first : end - first] if start < end else ():
            if problem := one.bounds.problem(*token):
                return problem
    return ""
