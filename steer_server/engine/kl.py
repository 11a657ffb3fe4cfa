"""KL divergence from the most likely tokens of two distributions: a lower bound."""

from __future__ import annotations

import math
from collections.abc import Mapping

_TINY = 1e-12


def kl_lower_bound(plain: Mapping[int, float], steered: Mapping[int, float]) -> float:
    """At most KL(plain || steered), in nats.

    Both are log-probabilities by token id, each of some tokens only. The tokens that are in both keep their place and
    all others share one: of two distributions made coarser alike, the divergence is not larger (data processing
    inequality), and it is the same where the others have the same ratio.
    """
    common = plain.keys() & steered.keys()
    found = math.fsum(math.exp(plain[token]) * (plain[token] - steered[token]) for token in common)
    rest = max(0.0, 1.0 - math.fsum(math.exp(plain[token]) for token in common))
    other = max(_TINY, 1.0 - math.fsum(math.exp(steered[token]) for token in common))
    if rest > _TINY:
        found += rest * math.log(rest / other)
    return max(0.0, found)
