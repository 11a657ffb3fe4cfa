"""What a calibration tries, and the bounds that a setting must keep to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from operators.core.errors import TrialError
from operators.core.header import MAX_WORDS, CalibrationPoint
from operators.core.measured import Sampling
from operators.core.vector_source import MAX_WORD
from operators.tune.form import ALL_FORMS, Form
from operators.tune.metrics import WordList
from operators.tune.prompts import neutral_prompts


@dataclass(frozen=True)
class Stage:
    """One round of the search: texts of ``tokens`` tokens on the first ``prompts`` prompts, ``rounds`` strengths."""

    prompts: int
    tokens: int
    rounds: int
    kept: int
    """Candidates that go on to the next stage."""


@dataclass(frozen=True)
class CalibrationSpec:
    """Filled by the ``calibrate`` and ``build`` commands.

    ``words``: those that show the concept in a text. ``prompts``: how the texts begin; ``held_out``: those that the
    figure of the chosen setting is measured on, none of them a prompt of the search. ``layers``: None means the
    operator's own, and those of the middle of the model where the anchor says the words best. ``kl_budget``: bound on
    the 95th percentile of KL(plain || steered), in nats. ``max_perplexity_ratio``: bound on the perplexity of the
    steered texts under the plain model, over that of the plain texts. ``min_distinct_ratio``: bound on their
    distinct-2, likewise. ``tokens``: per text. ``quick``: fewer layers, prompts and strengths, for a first impression.
    """

    words: tuple[str, ...]
    prompts: tuple[str, ...]
    held_out: tuple[str, ...] = field(default_factory=neutral_prompts)
    layers: tuple[int, ...] | None = None
    forms: tuple[Form, ...] = ALL_FORMS
    kl_budget: float = 1.0
    max_perplexity_ratio: float = 2.0
    min_distinct_ratio: float = 0.75
    tokens: int = 24
    sampling: Sampling = field(default_factory=Sampling)
    quick: bool = False

    def __post_init__(self) -> None:
        """Raises :class:`TrialError` or :class:`SettingError` for a field that is empty or out of range."""
        WordList(self.words)
        if len(self.words) > MAX_WORDS or max(map(len, self.words)) > MAX_WORD:
            raise TrialError(f"words: at most {MAX_WORDS} of {MAX_WORD} characters are accepted")
        for name, values in (("prompts", self.prompts), ("held-out prompts", self.held_out), ("forms", self.forms)):
            if not values:
                raise TrialError(f"there are no {name}; at least one is needed")
        both = next((prompt for prompt in self.held_out if prompt in set(self.prompts)), None)
        if both is not None:
            raise TrialError(
                f"prompt {both[:60]!r} is held out and searched with; prompts of one kind only are accepted "
                "(--held-out names a file of others)"
            )
        for form in self.forms:
            form.setting(0.0)
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

    @property
    def max_layers(self) -> int:
        """Layers that go into the first stage, where none are given: the operator's own, and the most accessible."""
        return 2 if self.quick else 3

    @property
    def stages(self) -> tuple[Stage, Stage, Stage, Stage]:
        """The rounds, in order: layers by the anchors alone, forms at the best layer, finalists, the last two."""
        short, all_prompts = min(self.tokens, 16), len(self.prompts)
        few, half = min(6, all_prompts), min(12, all_prompts)
        if self.quick:
            few, half, all_prompts = min(4, all_prompts), min(8, all_prompts), min(12, all_prompts)
        return (
            Stage(few, short, 2, kept=1),
            Stage(few, short, 2, kept=4),
            Stage(half, self.tokens, 2, kept=2),
            Stage(all_prompts, self.tokens, 2 if self.quick else 3, kept=1),
        )
