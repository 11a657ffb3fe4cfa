"""The strength at which an operator uses up a budget of KL."""

from __future__ import annotations

import math
from collections.abc import Sequence

FIRST_STRENGTH = 0.4
MIN_STRENGTH = 0.01
"""About what hidden states in bfloat16 resolve."""
MAX_STRENGTH = 2.0
"""A push of twice the hidden state's norm: nothing of the text would be left."""
CLOSE = 0.85
"""A strength that uses this share of the budget is close enough."""
_NARROW = 1.03


def next_strength(tried: Sequence[tuple[float, float]], budget: float, first: float = FIRST_STRENGTH) -> float | None:
    """The next strength to try, given pairs (strength, KL) tried so far; None when one is close, or none is left.

    Bisection between the largest strength within the budget and the next one above it, at the place where a line
    through log KL over log strength meets the budget, kept off the ends. Without both ends, KL is taken to grow as
    the strength squared, as it does for small ones. Texts change in jumps, so KL over strength does too: the search
    ends when its two ends are within 3 %, whatever is between them.
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
        if above[0] <= MIN_STRENGTH:
            return None
        return rounded(max(above[0] * min(max(math.sqrt(target / above[1]), 0.25), 0.9), MIN_STRENGTH))
    if above is None:
        if below[0] >= MAX_STRENGTH:
            return None
        return rounded(min(below[0] * min(max(math.sqrt(target / max(below[1], 1e-9)), 1.1), 2.5), MAX_STRENGTH))
    width = math.log(above[0] / below[0])
    if width < math.log(_NARROW):
        return None
    rise = math.log(above[1] / max(below[1], 1e-9))
    share = math.log(target / max(below[1], 1e-9)) / rise
    between = rounded(below[0] * math.exp(width * min(max(share, 0.15), 0.85)))
    return between if below[0] < between < above[0] else None


def rounded(strength: float) -> float:
    """To three digits: what is stored is what was tried, and people can type it."""
    return float(f"{strength:.3g}")
