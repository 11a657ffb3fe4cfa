"""Means over prompts and concepts with bootstrap intervals, and differences of two forms on the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval where prompts are drawn anew, and where prompts and concepts are.

    One concept tells nothing of others: then there is no second interval. Of few, it is too narrow.
    """

    mean: float
    prompts: tuple[float, float]
    both: tuple[float, float] | None


def estimate(values: np.ndarray, seed: int = 0) -> Estimate:
    """Of ``values`` (concepts, prompts): every concept has the same prompts, drawn for all of them together."""
    concepts, prompts = values.shape
    by_concept = _resampled(prompts, seed) @ values.T
    mean, first = float(values.mean()), _interval(by_concept.mean(1))
    if concepts == 1:
        return Estimate(mean, first, None)
    drawn = _resampled(concepts, seed + 1)
    return Estimate(mean, first, _interval((by_concept * drawn).sum(1)))


@lru_cache(maxsize=64)
def _resampled(count: int, seed: int) -> np.ndarray:
    """How often each of ``count`` things is drawn, over ``count``, (RESAMPLES, count)."""
    shares = np.full(count, 1.0 / count)
    return np.asarray(np.random.default_rng(seed).multinomial(count, shares, RESAMPLES) / count)


def _interval(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
