"""The strength at which an operator uses up a budget of KL."""

from __future__ import annotations

import math
from collections.abc import Sequence

FIRST_STRENGTH = 0.4
MIN_STRENGTH = 0.01
"""About the smallest strength that hidden states in bfloat16 resolve."""
MAX_STRENGTH = 2.0
"""A push as long as the hidden state itself: stronger ones leave no sensible text."""
CLOSE = 0.85
"""Share of the budget: a strength whose KL is between it and the budget ends the search."""
_NARROW = 1.03
"""Ratio of the two ends below which bisection ends."""


def next_strength(
    tried: Sequence[tuple[float, float]],
    budget: float,
    first: float = FIRST_STRENGTH,
    *,
    weakest: float = MIN_STRENGTH,
) -> float | None:
    """The next strength to try, given the pairs (strength, KL) tried so far; None when the search has ended.

    It ends when a strength is close to the budget, or none is left in [``weakest``, MAX_STRENGTH].

    Bisection between the largest strength within the budget and the next one above it, at the point where a line
    through log KL over log strength meets the budget, kept away from both ends. As long as one end is missing, KL is
    taken to grow with the square of the strength, as it does for small ones. Texts change in steps, and so KL is not a
    continuous function of the strength: the search also ends when its two ends are within 3 % of each other.
    """
    if not tried:
        return first
    below = max(((s, kl) for s, kl in tried if kl <= budget), default=None)
    above = min(((s, kl) for s, kl in tried if kl > budget and (below is None or s > below[0])), default=None)
    if below is not None and below[1] >= CLOSE * budget:
        return None
    target = math.sqrt(CLOSE) * budget
    if below is None:
        assert above is not None  # noqa: S101 - for the type checker: something was tried
        if above[0] <= weakest:
            return None
        return round_strength(max(above[0] * min(max(math.sqrt(target / above[1]), 0.25), 0.9), weakest))
    if above is None:
        if below[0] >= MAX_STRENGTH:
            return None
        return round_strength(min(below[0] * min(max(math.sqrt(target / max(below[1], 1e-9)), 1.1), 2.5), MAX_STRENGTH))
    width = math.log(above[0] / below[0])
    if width < math.log(_NARROW):
        return None
    rise = math.log(above[1] / max(below[1], 1e-9))
    share = math.log(target / max(below[1], 1e-9)) / rise
    between = round_strength(below[0] * math.exp(width * min(max(share, 0.15), 0.85)))
    return between if below[0] < between < above[0] else None


def round_strength(strength: float) -> float:
    """To three significant digits: short enough to type, and what is stored is exactly what was tried."""
    return float(f"{strength:.3g}")
