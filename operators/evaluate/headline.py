"""The one table that answers: useful texts of every form at one dose, however they are written, best first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from operators.evaluate.arms import PLAIN
from operators.evaluate.form import CONTRAST
from operators.evaluate.intervals import Estimate
from operators.evaluate.summary import Figures, Summary


def headline(summary: Summary, concepts: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown: per regime and length, useful texts at p95 KL 1, or at the regime's first dose."""
    run = summary.run
    columns = [
        (regime, tokens)
        for regime in run["protocol"]["regimes"]
        # A run that was stopped has not come to all of them.
        if summary.cells(regime["name"])
        for tokens in run["protocol"]["lengths"]
    ]
    first = columns[0]
    order = sorted(run["forms"], key=lambda form: -_useful(_figures(summary, form, *first, concepts)))
    titles = [f"{regime['name']} {tokens}, {_dose(regime)}" for regime, tokens in columns]
    yield f"| form | {' | '.join(titles)} | vs anchor, {titles[0]} | hits, {titles[0]} |"
    yield f"|---|{'---|' * (len(columns) + 2)}"
    for form in (PLAIN, *order):
        found = [_figures(summary, form, *column, concepts) for column in columns]
        if any(found):
            name = f"**{form}**" if form == CONTRAST else form
            cells = ["–" if one is None else _mean(one.useful, one) for one in found]
            difference = "" if found[0] is None or found[0].difference is None else interval(found[0].difference, "+")
            hits = "" if found[0] is None else f"{found[0].hits.mean:.2f}"
            yield f"| {name} | {' | '.join(cells)} | {difference} | {hits} |"


def interval(value: Estimate, sign: str = "") -> str:
    """``0.43 [0.35, 0.52] [0.20, 0.66]``: the mean, its intervals over prompts and, if any, over both."""
    found = (one for one in (value.prompts, value.both) if one is not None)
    return " ".join([f"{value.mean:{sign}.2f}", *(f"[{low:{sign}.2f}, {high:{sign}.2f}]" for low, high in found)])


def mark(figures: Figures) -> str:
    """A dagger where the dose was not reached for every concept, and their number where some have no texts."""
    few = "" if figures.concepts == figures.asked else f" ({figures.concepts} of {figures.asked} concepts)"
    return few if figures.reached == figures.concepts else f"†{few}"


def _mean(value: Estimate, figures: Figures) -> str:
    return f"{value.mean:.2f}{mark(figures)}"


def _figures(
    summary: Summary, form: str, regime: Mapping[str, Any], tokens: int, concepts: Sequence[str]
) -> Figures | None:
    at_dose = summary.figures(form, regime["name"], _dose(regime), tokens, concepts)
    return at_dose or summary.figures(form, regime["name"], None, tokens, concepts)


def _dose(regime: Mapping[str, Any]) -> str:
    doses: list[str] = regime["budgets"]
    return "p95 KL 1" if "p95 KL 1" in doses else doses[0]


def _useful(figures: Figures | None) -> float:
    return -1.0 if figures is None else figures.useful.mean
