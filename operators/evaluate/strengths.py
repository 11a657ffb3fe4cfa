"""The strength at which a form is as far from the plain model as a budget says, from strengths that were tried.

First a coarse grid, then, for every budget, the point where a line through log KL over log strength meets it. Texts
change in steps, so KL is no continuous function of the strength: what is closest in the end is taken, and said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from operators.evaluate.protocol import LEAST, MOST, Budget
from operators.tune.strength_search import round_strength

_CLOSE = 0.08
"""A KL within this share of its budget ends the search for it."""
_REACHED = 0.3
"""A KL further off than this share is not the budget's: the row is shown, and marked."""
ROUNDS = 3
"""Refinements per budget, at most."""


@dataclass(frozen=True)
class Trial:
    """A strength, and the KL of its texts on development prompts, in nats."""

    strength: float
    kl_p95: float
    kl_mean: float

    def kl(self, budget: Budget) -> float:
        """What ``budget`` measures."""
        return self.kl_p95 if budget.measure == "p95" else self.kl_mean


def next_strengths(tried: Sequence[Trial], budgets: Sequence[Budget], first: Sequence[float]) -> list[float]:
    """The strengths to try next, given those tried; none when the search has ended.

    ``first``: those that the search begins with.
    """
    known = {trial.strength for trial in tried}
    missing = [strength for strength in first if strength not in known]
    if missing:
        return missing
    if len(known) >= len(first) + ROUNDS * len(budgets):
        return []
    proposals = [_between(tried, budget) for budget in budgets]
    return sorted({one for one in proposals if one is not None and one not in known})


def closest(tried: Sequence[Trial], budget: Budget) -> tuple[Trial, bool]:
    """The trial closest to a budget, and whether it is close enough to be called by its name."""
    best = min(tried, key=lambda trial: _distance(trial, budget))
    return best, _distance(best, budget) <= math.log(1 + _REACHED)


def _distance(trial: Trial, budget: Budget) -> float:
    return abs(math.log(max(trial.kl(budget), 1e-9) / budget.nats))


def _between(tried: Sequence[Trial], budget: Budget) -> float | None:
    if _distance(closest(tried, budget)[0], budget) <= math.log(1 + _CLOSE):
        return None
    ordered = sorted(tried, key=lambda trial: trial.strength)
    above = next((trial for trial in ordered if trial.kl(budget) > budget.nats), None)
    if above is None:
        # KL grows about as the square of the strength.
        last = ordered[-1]
        factor = math.sqrt(budget.nats / max(last.kl(budget), 1e-9))
        return _bounded(last.strength * min(max(factor, 1.1), 2.5), last.strength)
    below = next((trial for trial in reversed(ordered) if trial.strength < above.strength), None)
    if below is None:
        factor = math.sqrt(budget.nats / above.kl(budget))
        return _bounded(above.strength * min(max(factor, 0.25), 0.9), above.strength)
    if above.strength / below.strength < 1.03:
        return None
    low, high = (math.log(max(trial.kl(budget), 1e-9)) for trial in (below, above))
    share = min(max((math.log(budget.nats) - low) / (high - low), 0.1), 0.9)
    return round_strength(below.strength * (above.strength / below.strength) ** share)


def _bounded(strength: float, last: float) -> float | None:
    found = round_strength(min(max(strength, LEAST), MOST))
    return None if found == last else found
