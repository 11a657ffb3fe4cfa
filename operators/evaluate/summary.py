"""Rows to figures: of each form, regime, dose and length, over some concepts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from operators.core.errors import TrialError
from operators.evaluate.arms import PLAIN
from operators.evaluate.form import CONTRAST, IMPORTED, PREFIX
from operators.evaluate.intervals import Estimate, estimate
from operators.evaluate.journal import Journal, Row
from operators.evaluate.measures import flags, is_useful


@dataclass(frozen=True)
class Figures:
    """Of the texts of one form at one dose, over concepts and prompts (and, of a band, over its directions).

    ``concepts`` of the ``asked`` ones have rows. ``useful`` are hits worth reading; away from a concept, texts that
    avoid its words and are. ``difference``: useful minus that of the contrast anchor, prompt by prompt. ``kl_p95`` and
    ``kl_mean`` are means over the concepts of what was measured. ``band``: least and most hits of one of its
    ``directions``. ``reached``: how many concepts are near the dose.
    """

    form: str
    regime: str
    budget: str | None
    tokens: int
    asked: int
    concepts: int
    prompts: int
    hits: Estimate
    useful: Estimate
    difference: Estimate | None
    name_share: float | None
    perplexity_ratio: float
    distinct_ratio: float
    loops: float
    kl_p95: float
    kl_mean: float
    strength: tuple[float, float]
    reached: int
    band: tuple[float, float] | None
    directions: int


_Cell = tuple[str, str, str | None]
"""Form, regime, budget."""


class Summary:
    """The figures of one run, from its rows."""

    def __init__(self, journal: Journal, run: Mapping[str, Any]) -> None:
        """``run``: what ``run.json`` states. Raises :class:`TrialError` where there are no texts of that run."""
        self.run = run
        self._known: dict[tuple[object, ...], Figures | None] = {}
        self._rows: dict[_Cell, dict[str | None, list[Row]]] = {}
        latest = {_place(row["of"]): row for row in journal.rows.values() if self._is_of_run(row["of"])}
        for row in latest.values():
            of = row["of"]
            cell = of["form"], of["regime"], of["budget"]
            self._rows.setdefault(cell, {}).setdefault(of["subject"], []).append(row)
        if not self._rows:
            raise TrialError("there are no texts of this run; `steer-operators eval` with --out writes them")

    def _is_of_run(self, of: Mapping[str, Any]) -> bool:
        """Whether a row is of this run's texts, and of its forms and vectors as they are now."""
        run = self.run
        if (of["kind"], of["run"]) != ("texts", run["digest"]) or of["concepts"] not in run["concept_digests"]:
            return False
        source, _, vector = of["form_digest"].partition("/")
        if vector and run["vectors"].get(of["subject"]) != vector:
            return False
        return bool(of["form"] == PLAIN or (of["form"] in run["forms"] and run["form_digests"][of["form"]] == source))

    def cells(self, regime: str) -> list[tuple[str, str | None]]:
        """Forms and budgets of a regime, the plain texts first and then as they were written."""
        found = [(form, budget) for form, name, budget in self._rows if name == regime]
        order = {form: place for place, form in enumerate([PLAIN, PREFIX, *self.run["forms"]])}
        return sorted(found, key=lambda cell: order.get(cell[0], len(order)))

    def figures(
        self, form: str, regime: str, budget: str | None, tokens: int, concepts: Sequence[str]
    ) -> Figures | None:
        """Of the concepts that have rows; None where none has."""
        key = form, regime, budget, tokens, *concepts
        if key not in self._known:
            self._known[key] = self._figures(form, regime, budget, tokens, concepts)
        return self._known[key]

    def _figures(
        self, form: str, regime: str, budget: str | None, tokens: int, concepts: Sequence[str]
    ) -> Figures | None:
        there = [
            name
            for name in concepts
            if self._find(form, regime, budget, name) and self._find(PLAIN, regime, None, name)
        ]
        if not there:
            return None
        away, reference = regime.endswith("-away"), (CONTRAST, regime, budget)
        per_concept = [self._values(form, regime, budget, tokens, name, away) for name in there]
        hits, useful, named = (np.stack([one[key] for one in per_concept]) for key in ("hits", "useful", "named"))
        difference = None
        if budget is not None and form != CONTRAST and all(self._find(*reference, name) for name in there):
            other = np.stack([self._values(*reference, tokens, name, away)["useful"] for name in there])
            difference = estimate(useful - other)
        rows = [row for name in there for row in self._find(form, regime, budget, name)]
        strengths = [row["of"]["strength"] for row in rows]
        bands = np.stack([one["by_direction"] for one in per_concept]).mean(0)
        return Figures(
            form, regime, budget, tokens, len(concepts), len(there), hits.shape[1],
            estimate(hits), estimate(useful), difference,
            float(named.sum() / hits.sum()) if hits.sum() else None,
            math.exp(float(np.mean([one["surprise"] for one in per_concept]))),
            float(np.mean([one["variety"] for one in per_concept])),
            float(np.mean([one["loops"] for one in per_concept])),
            float(np.mean([row["lengths"][str(tokens)]["kl_p95"] for row in rows])),
            float(np.mean([row["lengths"][str(tokens)]["kl_mean"] for row in rows])),
            (min(strengths), max(strengths)),
            sum(all(row["reached"] for row in self._find(form, regime, budget, name)) for name in there),
            (float(bands.min()), float(bands.max())) if len(bands) > 1 else None,
            len(bands),
        )  # fmt: skip

    def missing(self, regime: Mapping[str, Any]) -> tuple[int, int]:
        """How many of a regime's rows (form, dose, concept) there are not, of how many that were asked for."""
        vectors, concepts = self.run["vectors"], [concept["name"] for concept in self.run["concepts"]]
        asked = [
            (form, regime["name"], budget, concept)
            for form in self.run["forms"]
            if form != PREFIX or not regime["name"].endswith("-away")
            for budget in ([None] if form == PREFIX else regime["budgets"])
            for concept in concepts
            if form != IMPORTED or concept in vectors
        ]
        return sum(not self._find(*one) for one in asked), len(asked)

    def shown(self, form: str, regime: str, budget: str | None, concept: str) -> list[str]:
        """The first texts of a cell."""
        rows = self._find(form, regime, budget, concept)
        return list(rows[0]["shown"]) if rows else []

    def _find(self, form: str, regime: str, budget: str | None, concept: str) -> list[Row]:
        by_subject = self._rows.get((form, regime, budget), {})
        return by_subject.get(concept) or by_subject.get(None) or []

    def _values(
        self, form: str, regime: str, budget: str | None, tokens: int, concept: str, away: bool
    ) -> dict[str, Any]:
        """Per prompt, (prompts,), the mean over the directions of a band; and what is of all prompts together."""
        plain = self._find(PLAIN, regime, None, concept)[0]["lengths"][str(tokens)]
        rows = [row["lengths"][str(tokens)] for row in self._find(form, regime, budget, concept)]
        hits = np.stack([flags(row["words"][concept]["hits"]) for row in rows])
        named = np.stack([flags(row["words"][concept]["named"]) for row in rows])
        useful = np.stack([is_useful(row | row["words"][concept], plain, away=away) for row in rows])
        return {
            "hits": hits.mean(0),
            "useful": useful.mean(0),
            "named": named.mean(0),
            "by_direction": hits.mean(1),
            "surprise": float(np.mean([row["nll"] for row in rows]) - np.mean(plain["nll"])),
            "variety": float(np.mean([row["distinct"] for row in rows]) / np.mean(plain["distinct"])),
            "loops": float(np.mean([flags(row["loops"]).mean() for row in rows])),
        }


def _place(of: Mapping[str, Any]) -> tuple[object, ...]:
    """A row's place in the tables: of two there, the later one counts."""
    return tuple(of[name] for name in ("form", "variant", "subject", "regime", "budget"))
