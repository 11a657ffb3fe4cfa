"""What an evaluation does, stated before it is run: prompts to develop on and prompts to report, doses, samplings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise
from typing import Any, Literal

from operators.core.errors import TrialError
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.sampling import GREEDY, PENALISED, SAMPLED, SAMPLED_PENALISED, Sampling
from operators.tune.prompts import calibration_prompts

VERSION = 1
"""Of what rows mean; rows of another are not read."""
GRID = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
LEAST, MOST = 0.003, 4.0
"""The strengths that a search begins with, and those that it does not leave."""
_MAX_PROMPTS = 10_000
_MAX_TOKENS = 4096
_MAX_NATS = 100.0


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
    Regime(SAMPLED_PENALISED, _TWO),
    Regime(GREEDY, _TWO, -1),
)
QUICK = (Regime(GREEDY, (Budget("p95", 1.0),)),)


@dataclass(frozen=True)
class Protocol:
    """Strengths are found on ``development`` prompts, by KL alone; everything reported is of ``held_out`` prompts.

    ``lengths``: tokens per text that are reported, ascending; a short text is the beginning of the long one. The search
    for strengths uses the first of them, and begins with ``strengths``.
    """

    development: tuple[str, ...]
    held_out: tuple[str, ...]
    regimes: tuple[Regime, ...] = FULL
    lengths: tuple[int, ...] = (24, 64)
    strengths: tuple[float, ...] = GRID
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_prompts()
        if not _ascends(self.lengths) or not 2 <= self.lengths[0] <= self.lengths[-1] <= _MAX_TOKENS:
            raise TrialError(f"tokens are {_shown(self.lengths)}; 2 to {_MAX_TOKENS}, ascending, are accepted")
        if not _ascends(self.strengths) or not LEAST <= self.strengths[0] <= self.strengths[-1] <= MOST:
            raise TrialError(f"strengths are {_shown(self.strengths)}; {LEAST:g} to {MOST:g}, ascending, are accepted")

    def _check_prompts(self) -> None:
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
            "strengths": list(self.strengths),
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
    *,
    quick: bool = False,
    development: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
    num_development: int | None = None,
    num_held_out: int | None = None,
    regimes: Sequence[str] | None = None,
    doses: Sequence[float] | None = None,
    lengths: Sequence[int] | None = None,
    strengths: Sequence[float] | None = None,
) -> Protocol:
    """The full protocol, or a small one, with what is given in place of its own.

    ``num_development`` and ``num_held_out`` take the first so many prompts; ``regimes`` are names; ``doses`` are p95 KL
    in nats, of every regime.

    Raises:
        TrialError: there is no such regime, or there are fewer prompts; or a value is out of range.
    """
    whole = Protocol(
        tuple(calibration_prompts() if development is None else development),
        tuple(evaluation_prompts() if held_out is None else held_out),
    )
    first, second = whole.development, whole.held_out
    protocol = Protocol(first[:6], second[:12], QUICK, (12, 24)) if quick else whole
    return replace(
        protocol,
        development=protocol.development if num_development is None else _first(first, num_development, "development"),
        held_out=protocol.held_out if num_held_out is None else _first(second, num_held_out, "held-out"),
        regimes=_regimes(protocol.regimes if regimes is None else _named(regimes), doses),
        lengths=protocol.lengths if lengths is None else tuple(lengths),
        strengths=protocol.strengths if strengths is None else tuple(strengths),
    )


def _first(prompts: tuple[str, ...], count: int, name: str) -> tuple[str, ...]:
    if not 1 <= count <= len(prompts):
        raise TrialError(f"{count} {name} prompts; there are {len(prompts)}, and 1 to {len(prompts)} are accepted")
    return prompts[:count]


def _named(names: Sequence[str]) -> tuple[Regime, ...]:
    there = {regime.name: regime for regime in FULL}
    unknown = next((name for name in names if name not in there), None)
    if unknown is not None:
        raise TrialError(f"regime {unknown!r} does not exist; there are: {', '.join(there)}")
    return tuple(there[name] for name in dict.fromkeys(names))


def _regimes(regimes: tuple[Regime, ...], doses: Sequence[float] | None) -> tuple[Regime, ...]:
    if doses is None:
        return regimes
    if not doses or not all(0 < nats <= _MAX_NATS for nats in doses):
        raise TrialError(f"doses are {_shown(doses)}; more than 0 and at most {_MAX_NATS:g} nats are accepted")
    budgets = tuple(Budget("p95", nats) for nats in sorted(set(doses)))
    return tuple(replace(regime, budgets=budgets) for regime in regimes)


def _ascends(values: Sequence[float]) -> bool:
    return bool(values) and all(low < high for low, high in pairwise(values))


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"


def digest(value: object) -> str:
    """The first 12 hexadecimal digits of the sha256 of ``value`` as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:12]


def concept_digest(concept: EvalConcept) -> str:
    """Of everything that a form may take from a concept, and of the words that are counted."""
    return digest([concept.texts, concept.words, concept.word])
