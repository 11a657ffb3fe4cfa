"""What an evaluation does, stated before it is run: prompts to develop on and prompts to report, doses, samplings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from operators.core.errors import TrialError
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.sampling import GREEDY, PENALISED, SAMPLED, Sampling
from operators.tune.prompts import calibration_prompts

VERSION = 1
"""Of what rows mean; rows of another are not read."""
_MAX_PROMPTS = 10_000


@dataclass(frozen=True)
class Budget:
    """A distance from the plain model: the 95th percentile over tokens of KL(plain || steered), or the mean."""

    measure: Literal["p95", "mean"]
    nats: float

    def __str__(self) -> str:
        return f"{self.measure} KL {self.nats:g}"


@dataclass(frozen=True)
class Regime:
    """One way of writing, towards the concept (sign 1) or away from it (-1), and the doses that it is reported at."""

    sampling: Sampling
    budgets: tuple[Budget, ...]
    sign: Literal[1, -1] = 1

    @property
    def name(self) -> str:
        """``greedy``, ``greedy-away``."""
        return self.sampling.name if self.sign == 1 else f"{self.sampling.name}-away"


_P95 = tuple(Budget("p95", nats) for nats in (0.5, 1.0, 2.0))
_TWO = (Budget("p95", 0.5), Budget("p95", 1.0))
FULL = (
    Regime(GREEDY, (*_P95, Budget("mean", 0.25))),
    Regime(PENALISED, _TWO),
    Regime(SAMPLED, _TWO),
    Regime(GREEDY, _TWO, -1),
)
QUICK = (Regime(GREEDY, (Budget("p95", 1.0),)),)


@dataclass(frozen=True)
class Protocol:
    """Strengths are found on ``development`` prompts, by KL alone; everything reported is of ``held_out`` prompts.

    ``lengths``: tokens per text that are reported, ascending; a short text is the beginning of the long one. The search
    for strengths uses the first of them.
    """

    development: tuple[str, ...]
    held_out: tuple[str, ...]
    regimes: tuple[Regime, ...] = FULL
    lengths: tuple[int, ...] = (24, 64)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, prompts in (("development", self.development), ("held-out", self.held_out)):
            if not 1 <= len(prompts) <= _MAX_PROMPTS:
                raise TrialError(f"{len(prompts)} {name} prompts; 1 to {_MAX_PROMPTS} are accepted")
            twice = next((prompt for prompt in prompts if prompts.count(prompt) > 1), None)
            if twice is not None:
                raise TrialError(f"{name} prompt {twice!r} is there twice; each once is accepted")
        both = next((prompt for prompt in self.held_out if prompt in set(self.development)), None)
        if both is not None:
            raise TrialError(
                f"prompt {both!r} is a development prompt and a held-out one; what is reported must be of prompts "
                "that nothing was chosen on"
            )

    def describe(self) -> dict[str, Any]:
        """As ``run.json`` states it."""
        return {
            "version": VERSION,
            "development_prompts": list(self.development),
            "held_out_prompts": list(self.held_out),
            "lengths": list(self.lengths),
            "seed": self.seed,
            "regimes": [
                {"name": regime.name, "sampling": str(regime.sampling), "budgets": list(map(str, regime.budgets))}
                for regime in self.regimes
            ],
        }


def evaluation_prompts() -> tuple[str, ...]:
    """The held-out prompts that ship: neutral openings, none of which is in another list."""
    text = (resources.files("operators") / "data" / "prompts_evaluation.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def make_protocol(
    *, quick: bool = False, development: Sequence[str] | None = None, held_out: Sequence[str] | None = None
) -> Protocol:
    """The full protocol, or a small one; the prompts that are not given are those that ship."""
    first = tuple(calibration_prompts() if development is None else development)
    second = tuple(evaluation_prompts() if held_out is None else held_out)
    if not quick:
        return Protocol(first, second)
    return Protocol(first[:6], second[:12], QUICK, (12, 24))


def digest(value: object) -> str:
    """The first 12 hexadecimal digits of the sha256 of ``value`` as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:12]


def concept_digest(concept: EvalConcept) -> str:
    """Of everything that a form may take from a concept, and of the words that are counted."""
    return digest([concept.texts, concept.words, concept.word])
