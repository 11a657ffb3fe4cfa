"""Shares, means and ratios of the texts of one arm, with intervals over prompts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from steer_client._sweep.rows import SweepRow

Item = TypeVar("Item")

_RESAMPLES = 1000
_LEVEL = 0.95
#: The quantile of the normal distribution that _LEVEL has on both sides.
_Z = 1.959963984540054

#: What `ArmSummary` has of an arm, by the names that tables and plots take.
METRICS = ("hits", "useful_hits", "kl_mean", "kl_p95", "perplexity_ratio")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval over prompts; of one prompt alone a mean has none."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" ({self.low:.2f}–{self.high:.2f})"
        return f"{self.value:.2f}{interval}"


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """All texts of one operator at one strength; those of "normal" have no strength. What was not measured is None."""

    operator: str
    strength: float | None
    #: Texts, and the prompts that they are of.
    n: int
    num_prompts: int
    #: Share of the texts with one of the words, and of those that repeat no four tokens in a row too. Wilson intervals,
    #: of as many trials as there are prompts: several seeds of a prompt do not count as independent.
    hits: Estimate | None
    useful_hits: Estimate | None
    #: KL(plain ‖ steered) in nats over all tokens. The interval is a bootstrap's, which draws prompts.
    kl_mean: Estimate | None
    kl_p95: Estimate | None
    #: Of the texts, under the plain model, over that of the plain texts; bootstrap. 1 of the plain ones.
    perplexity_ratio: Estimate | None


def summarise(rows: Sequence[SweepRow], plain: Sequence[SweepRow], *, has_words: bool) -> ArmSummary:
    """Of one or more rows of one arm, and the plain rows of the same prompts and seeds."""
    by_prompt: dict[str, list[SweepRow]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_id, []).append(row)
    texts = list(by_prompt.values())
    kl = [[value for row in each for value in row.kl_per_token] for each in texts]
    has_kl = any(kl)
    baseline = {(row.prompt_id, row.seed): row for row in plain}
    pairs = [[(row, baseline.get((row.prompt_id, row.seed))) for row in each] for each in texts]
    return ArmSummary(
        rows[0].operator,
        rows[0].strength,
        len(rows),
        len(texts),
        _share(texts, lambda row: row.is_hit) if has_words else None,
        _share(texts, lambda row: row.is_useful) if has_words else None,
        _bootstrap([(math.fsum(each), len(each)) for each in kl], _ratio) if has_kl else None,
        Estimate(percentile([value for each in kl for value in each], 0.95)) if has_kl else None,
        _perplexity_ratio(pairs),
    )


def wilson(share: float, n: int) -> tuple[float, float]:
    """The Wilson score interval of a share of `n` trials."""
    middle = share + _Z**2 / (2 * n)
    reach = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def percentile(values: Sequence[float], share: float) -> float:
    """The quantile at `share` (0 to 1), interpolated linearly between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _share(texts: Sequence[Sequence[SweepRow]], holds: Callable[[SweepRow], bool]) -> Estimate:
    share = sum(sum(map(holds, each)) / len(each) for each in texts) / len(texts)
    return Estimate(share, *wilson(share, len(texts)))


def _perplexity_ratio(texts: Sequence[Sequence[tuple[SweepRow, SweepRow | None]]]) -> Estimate | None:
    """exp of the mean negative log-probability of the tokens, over that of the plain texts' tokens."""
    sums = []
    for pairs in texts:
        steered, plain = _surprisal([row for row, _ in pairs]), _surprisal([row for _, row in pairs])
        if steered is None or plain is None:
            return None
        sums.append((*steered, *plain))
    if not sum(each[1] for each in sums) or not sum(each[3] for each in sums):
        return None
    return _bootstrap(sums, lambda drawn: math.exp(min(_ratio(drawn) - _ratio([each[2:] for each in drawn]), 700.0)))


def _surprisal(rows: Sequence[SweepRow | None]) -> tuple[float, int] | None:
    """The sum of -log p over the tokens of the rows, and how many there are."""
    total, tokens = 0.0, 0
    for row in rows:
        if row is None or row.perplexity is None or not row.perplexity > 0:
            return None
        total += len(row.token_ids) * math.log(row.perplexity)
        tokens += len(row.token_ids)
    return total, tokens


def _ratio(drawn: Sequence[Sequence[float]]) -> float:
    tokens = sum(each[1] for each in drawn)
    return math.fsum(each[0] for each in drawn) / tokens if tokens else 0.0


def _bootstrap(values: Sequence[Item], statistic: Callable[[Sequence[Item]], float]) -> Estimate:
    """The statistic and its percentile interval where prompts are drawn anew. Repeatable."""
    value = statistic(values)
    if len(values) == 1:
        return Estimate(value)
    chance = random.Random(0)  # noqa: S311 - resampling, no secret
    drawn = [statistic(chance.choices(values, k=len(values))) for _ in range(_RESAMPLES)]
    return Estimate(value, percentile(drawn, (1 - _LEVEL) / 2), percentile(drawn, (1 + _LEVEL) / 2))


def by_arm(rows: Sequence[SweepRow]) -> Mapping[tuple[str, float | None], list[SweepRow]]:
    """Rows by operator and strength, in the order in which these first come."""
    found: dict[tuple[str, float | None], list[SweepRow]] = {}
    for row in rows:
        found.setdefault((row.operator, row.strength), []).append(row)
    return found
