"""How texts of a measurement were drawn, and what was measured on prompts that nothing was chosen on."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from operators.core.vector_source import STRICT, Count, Fingerprint

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


class Sampling(BaseModel):
    """How the tokens of a text are chosen. KL and log-probabilities are those of the model before any of it."""

    model_config = STRICT

    temperature: NonNegative = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] = 1.2
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0

    def __str__(self) -> str:
        """For people: ``greedy, repetition penalty 1.2``."""
        if self.temperature == 0.0:
            drawn = "greedy"
        else:
            top_p = "" if self.top_p == 1.0 else f", top-p {self.top_p:g}"
            drawn = f"temperature {self.temperature:g}{top_p}, seed {self.seed}"
        return drawn if self.repetition_penalty == 1.0 else f"{drawn}, repetition penalty {self.repetition_penalty:g}"


class HeldOut(BaseModel):
    """The chosen setting on prompts that the search never saw. Filled by :mod:`operators.tune.candidates`."""

    model_config = STRICT

    prompts: Count
    prompts_digest: Fingerprint
    """sha256 of the prompts, one per line."""
    hit_rate: Fraction
    useful_rate: Fraction
    """Share of the texts with one of the concept's words and without a repeated 4-gram of tokens."""
    useful_low: Fraction
    useful_high: Fraction
    """The 95 % interval of the useful rate: percentiles of bootstraps over the prompts."""
    kl_p95: NonNegative
    kl_mean: NonNegative
    perplexity_ratio: NonNegative
    distinct_2: Fraction
    plain_useful_rate: Fraction
