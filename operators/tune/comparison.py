"""Whether a new calibration may take the place of the recommendation that an operator has."""

from __future__ import annotations

from operators.core.header import Calibration, OperatorHeader

_TERMS = ("kl_budget", "max_perplexity_ratio", "min_distinct_ratio", "prompts", "tokens")
"""What two calibrations must share, beside their words, for their hit rates to mean the same."""


def is_comparable(one: Calibration, other: Calibration) -> bool:
    """Whether both measured the same: words, bounds, and number of prompts and of tokens."""
    return set(one.words) == set(other.words) and all(getattr(one, term) == getattr(other, term) for term in _TERMS)


def is_worse(found: Calibration, header: OperatorHeader) -> bool:
    """Whether the recommendation of ``header`` was calibrated, and is known to be better than what was ``found``.

    It is where nothing was found; or where the two are comparable, and what was found hits fewer texts.
    """
    point = header.calibrated_point
    if point is None or header.calibration is None:
        return False
    if found.chosen is None:
        return True
    return is_comparable(found, header.calibration) and found.points[found.chosen].hit_rate < point.hit_rate
