"""What a calibration tries, and the bounds that a setting must keep to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from operators.core.apply import Setting
from operators.core.errors import TrialError
from operators.core.header import MAX_WORDS, CalibrationPoint, Rule
from operators.core.vector_source import MAX_WORD
from operators.tune.metrics import WordList


@dataclass(frozen=True)
class CalibrationSpec:
    """Filled by the ``calibrate`` and ``build`` commands.

    ``words``: those that show the concept in a text. ``prompts``: how the texts begin. ``layers``: None means the
    operator's own and six over the middle of the model. ``kl_budget``: bound on the 95th percentile of KL(plain ||
    steered), in nats. ``max_perplexity_ratio``: bound on the perplexity of the steered texts under the plain model,
    over that of the plain texts. ``min_distinct_ratio``: bound on their distinct-2, likewise. ``tokens``: per text.
    """

    words: tuple[str, ...]
    prompts: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    rules: tuple[Rule, ...] = ("cumulative", "substitute")
    blends: tuple[float, ...] = (0.0, 0.5, 1.0)
    kl_budget: float = 1.0
    max_perplexity_ratio: float = 2.0
    min_distinct_ratio: float = 0.75
    tokens: int = 24

    def __post_init__(self) -> None:
        """Raises :class:`TrialError` or :class:`SettingError` for a field that is empty or out of range."""
        WordList(self.words)
        if len(self.words) > MAX_WORDS or max(map(len, self.words)) > MAX_WORD:
            raise TrialError(f"words: at most {MAX_WORDS} of {MAX_WORD} characters are accepted")
        for field, values in (("prompts", self.prompts), ("rules", self.rules), ("blends", self.blends)):
            if not values:
                raise TrialError(f"there are no {field}; at least one is needed")
        for rule in self.rules:
            for blend in self.blends:
                Setting(0.0, rule, blend)
        if not (math.isfinite(self.kl_budget) and self.kl_budget > 0):
            raise TrialError(f"KL budget is {self.kl_budget:g}; a finite number of nats above 0 is accepted")
        if not (math.isfinite(self.max_perplexity_ratio) and self.max_perplexity_ratio > 0):
            raise TrialError(f"perplexity ratio is {self.max_perplexity_ratio:g}; a finite number above 0 is accepted")
        if not 0 <= self.min_distinct_ratio <= 1:
            raise TrialError(f"distinct-2 ratio is {self.min_distinct_ratio:g}; a number from 0 to 1 is accepted")
        if self.tokens < 1:
            raise TrialError(f"tokens per text are {self.tokens}; 1 or more are accepted")

    def admits(self, point: CalibrationPoint, plain_distinct_2: float) -> bool:
        """Whether a point keeps to the KL budget and to both bounds of fluency."""
        return (
            point.kl_p95 <= self.kl_budget
            and point.perplexity_ratio <= self.max_perplexity_ratio
            and point.distinct_2 >= self.min_distinct_ratio * plain_distinct_2
        )
