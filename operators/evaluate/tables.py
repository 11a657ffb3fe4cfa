"""The tables of an evaluation as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from operators.evaluate.arms import PLAIN
from operators.evaluate.form import CONTRAST, all_forms
from operators.evaluate.headline import headline, interval, mark
from operators.evaluate.summary import Figures, Summary

_NOTES = """\
*Hits*: share of texts with a word of the concept. *Useful*: hits without four tokens that occur twice, of a perplexity
at most twice that of the plain texts, and with at least three quarters of their distinct-2. Brackets: 95 % bootstrap
intervals over prompts, then over prompts and concepts. *vs anchor*: useful minus that of `contrast-anchor`, paired by
prompt. *Name*: share of the hits' texts that have the concept's own name. *Loops*: texts with four tokens that occur
twice. KL is that measured on the held-out prompts, the mean over concepts; † where it was not within 30 % of the dose
on the development prompts for every concept. Strengths are found on development prompts, for each form and concept."""


def report_markdown(summary: Summary) -> str:
    """What was run; then, by concepts, regime and length, a table of all doses and one of each; then texts."""
    run = summary.run
    # A run that was stopped has not come to all of them.
    regimes = [regime for regime in run["protocol"]["regimes"] if summary.cells(regime["name"])]
    lines = [
        f"# Evaluation of {run['model']}, block {run['layer']}",
        "",
        *_about(run),
        *_missing(summary),
        "",
        _NOTES,
        "",
    ]
    for title, concepts in concept_sets(run).items():
        lines += [f"## {title}: useful texts in short", "", *headline(summary, concepts), ""]
    for title, concepts in concept_sets(run).items():
        for regime in regimes:
            for tokens in run["protocol"]["lengths"]:
                lines += [f"## {title}: {regime['name']}, {tokens} tokens", ""]
                lines += _overview(summary, regime, tokens, concepts)
    for regime in regimes:
        lines += [f"## Texts: {regime['name']}", "", *_examples(summary, regime)]
    return "\n".join(lines) + "\n"


def concept_sets(run: Mapping[str, Any]) -> dict[str, list[str]]:
    """Titles and concepts: those never developed on, where there are any, and all."""
    names = [concept["name"] for concept in run["concepts"]]
    fresh = [concept["name"] for concept in run["concepts"] if concept["fresh"]]
    sets = {f"{len(fresh)} fresh concepts": fresh} if fresh and len(fresh) < len(names) else {}
    return sets | {f"All {len(names)} concepts": names}


def _about(run: Mapping[str, Any]) -> Iterator[str]:
    protocol, fresh = run["protocol"], [one["name"] for one in run["concepts"] if one["fresh"]]
    used = [one["name"] for one in run["concepts"] if not one["fresh"]]
    yield (
        f"{len(run['forms'])} forms were looked at, on {run['dtype']} weights ({run['device']}): "
        f"{len(protocol['development_prompts'])} development prompts, {len(protocol['held_out_prompts'])} held-out "
        f"prompts, {len(run['concepts'])} concepts. Fresh: {', '.join(fresh) or 'none'}; used in development: "
        f"{', '.join(used) or 'none'}. Run {run['digest']}."
    )


def _missing(summary: Summary) -> Iterator[str]:
    """What a run that was stopped has not come to."""
    counts = {regime["name"]: summary.missing(regime) for regime in summary.run["protocol"]["regimes"]}
    said = [f"{name} {gone} of {asked}" for name, (gone, asked) in counts.items() if gone]
    if said:
        yield ""
        yield (
            f"**Not whole.** Rows (a form, dose and concept each) that are not there: {'; '.join(said)}. A form that "
            "lacks concepts says how many it has: it is not to be compared with one that has all."
        )


def _overview(summary: Summary, regime: Mapping[str, Any], tokens: int, concepts: Sequence[str]) -> Iterator[str]:
    away = regime["name"].endswith("-away")
    by_form: dict[str, dict[str | None, Figures]] = {}
    for form, budget in summary.cells(regime["name"]):
        found = summary.figures(form, regime["name"], budget, tokens, concepts)
        if found is not None:
            by_form.setdefault(form, {})[budget] = found
    what = "words left / avoided well" if away else "hits / useful"
    yield f"| form | {' | '.join(f'{budget}: {what}' for budget in regime['budgets'])} |"
    yield f"|---|{'---|' * len(regime['budgets'])}"
    for form, doses in by_form.items():
        if None in doses:
            one = doses[None]
            cell = f"{one.hits.mean:.2f} / {one.useful.mean:.2f} (p95 KL {one.kl_p95:.2f}, mean {one.kl_mean:.2f})"
            yield f"| {_label(form)} | {cell} |{' |' * (len(regime['budgets']) - 1)}"
            continue
        yield f"| {_label(form)} | {' | '.join(_short(doses.get(budget)) for budget in regime['budgets'])} |"
    yield ""
    for budget in regime["budgets"]:
        yield f"{budget}:"
        yield ""
        head = (
            "form",
            "hits",
            "useful",
            "vs anchor",
            "name",
            "perplexity",
            "distinct-2",
            "loops",
            "p95 KL",
            "mean KL",
            "λ",
        )
        yield f"| {' | '.join(head)} |"
        yield f"|{'---|' * len(head)}"
        for form, doses in by_form.items():
            figures = doses.get(budget) or doses.get(None)
            if figures is not None:
                yield f"| {_label(form)} | {' | '.join(_details(figures))} |"
        yield ""


def _short(figures: Figures | None) -> str:
    if figures is None:
        return "–"
    return f"{figures.hits.mean:.2f} / {figures.useful.mean:.2f}{mark(figures)}"


def _details(figures: Figures) -> tuple[str, ...]:
    low, high = figures.strength
    band = (
        ""
        if figures.band is None
        else f" (band {figures.band[0]:.2f}–{figures.band[1]:.2f} of {figures.directions} directions)"
    )
    return (
        interval(figures.hits) + band,
        interval(figures.useful),
        "" if figures.difference is None else interval(figures.difference, "+"),
        "–" if figures.name_share is None else f"{figures.name_share:.2f}",
        f"{figures.perplexity_ratio:.2f}",
        f"{figures.distinct_ratio:.2f}",
        f"{figures.loops:.2f}",
        f"{figures.kl_p95:.2f}{mark(figures)}",
        f"{figures.kl_mean:.2f}",
        "–" if not high else f"{low:g}–{high:g}" if low != high else f"{low:g}",
    )


def _examples(summary: Summary, regime: Mapping[str, Any]) -> Iterator[str]:
    run = summary.run
    concept, prompts = run["concepts"][-1]["name"], run["protocol"]["held_out_prompts"]
    name, budget = regime["name"], regime["budgets"][0]
    yield f"Concept {concept}, {budget}, the first prompts:"
    yield ""
    for form in dict.fromkeys((PLAIN, *run["forms"])):
        texts = next((found for one in (budget, None) if (found := summary.shown(form, name, one, concept))), [])
        pairs = list(zip(prompts, texts, strict=False))[:2]
        if pairs:
            yield f"* `{form}`: " + " · ".join(f"**{prompt}**{_one_line(text)}" for prompt, text in pairs)
    yield ""


def _one_line(text: str) -> str:
    plain = " ".join(text.split())
    # Texts of a model are data: no mark of theirs formats the page.
    safe = "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in plain if c.isprintable())
    return (" " if text[:1].isspace() else "") + safe


def _label(form: str) -> str:
    known = all_forms()
    about = "the plain model" if form == PLAIN else known[form].about if form in known else ""
    name = f"**{form}**" if form == CONTRAST else form
    return f"{name}: {about}" if about else name
