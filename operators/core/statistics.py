"""Order statistics, and intervals of what was measured."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

_RESAMPLES = 2000


def percentile(values: Sequence[float], share: float) -> float:
    """The quantile at ``share`` (0 to 1), interpolated linearly between order statistics as by numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def perplexity_of(logprobs: Sequence[float]) -> float:
    """exp(-mean) of one or more log-probabilities in nats; infinite where that is beyond the range of a float."""
    mean = math.fsum(logprobs) / len(logprobs)
    return math.exp(-mean) if mean > -700.0 else math.inf


def bootstrap_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of the mean of one or more values, each drawn anew with equal chances. Repeatable."""
    chance = random.Random(seed)  # noqa: S311 - resampling, not a secret
    means = [math.fsum(chance.choices(values, k=len(values))) / len(values) for _ in range(_RESAMPLES)]
    return percentile(means, (1 - level) / 2), percentile(means, (1 + level) / 2)
