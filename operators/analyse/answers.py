"""What the command prints: a JSON document and lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from operators.analyse.report import emergence_text
from operators.analyse.results import STABLE_RANK_KINDS, Analysis, ModelSummaries, ScoredToken
from operators.analyse.summary_page import median_and_quartiles

Answer = tuple[dict[str, Any], list[str]]
"""A JSON document for programs, and lines for people."""


def analysis_answer(analysis: Analysis, files: dict[str, str]) -> Answer:
    """One prompt. ``files``: the paths that were written, by what they are."""
    positions = [
        {
            "token": position.token.text,
            "stable_rank": position.stable_rank,
            "sigma": position.directions[0].sigma,
            "share": position.share,
            "term_norm": position.term_norm,
            "term_cosine": position.term_cosine,
            "reads": _texts(position.directions[0].right),
            "writes": _texts(position.directions[0].left),
        }
        for position in analysis.positions
    ]
    document: dict[str, Any] = {
        "schema": analysis.schema,
        "text": analysis.text,
        "model": analysis.model,
        "layer": analysis.layer,
        "num_layers": analysis.num_layers,
        "next_token": analysis.answer[0].text,
        "next_token_probability": analysis.answer[0].score,
        "detached_error": analysis.reconstruction.detached_error,
        "ordinary_error": analysis.reconstruction.ordinary_error,
        "mean_stable_rank": analysis.mean_stable_rank,
        "emergence": {name: getattr(analysis.emergence, name) for name in ("stream", "last", "first")},
        "positions": positions,
        "reads": _texts(analysis.reads),
        "reads_against": _texts(analysis.reads_against),
        "seconds": analysis.seconds,
        "files": files,
    }
    ranks = [position.stable_rank for position in analysis.positions]
    lines = _fields(
        {
            "next token": f"{analysis.answer[0].text!r}, probability {analysis.answer[0].score:.3g}",
            "reconstruction": f"{analysis.reconstruction.detached_error:.2e} detached, "
            f"{analysis.reconstruction.ordinary_error:.3g} ordinary Jacobian (|sum J x + c - h| / |h|)",
            "stable rank": f"{_number(ranks[0])} first, {_number(ranks[-1])} last, "
            f"{_number(analysis.mean_stable_rank)} mean over {len(ranks)} positions",
            "answer leads": f"stream {emergence_text(analysis.emergence.stream)}, u1 of the last position "
            f"{emergence_text(analysis.emergence.last)}, of the first {emergence_text(analysis.emergence.first)}",
            "reads": " ".join(map(repr, _texts(analysis.reads))),
            "u1 of the last": " ".join(map(repr, _texts(analysis.positions[-1].directions[0].left))),
            "report": files["report"],
            "seconds": analysis.seconds,
        }
    )
    return document, lines


def summaries_answer(summaries: ModelSummaries, files: dict[str, str]) -> Answer:
    """Several models. ``files``: the paths that were written, by what they are."""
    document: dict[str, Any] = {
        "schema": summaries.schema,
        "phrases": len(summaries.phrases),
        "models": [
            {
                "model": model.model,
                "architecture": model.architecture,
                "median_stable_rank": {
                    kind: median(values) if (values := model.stable_ranks(kind)) else None for kind in STABLE_RANK_KINDS
                },
                "seconds": model.seconds,
            }
            for model in summaries.models
        ],
        "files": files,
    }
    lines = ["stable rank over phrases: median [middle half]"]
    for model in summaries.models:
        stable_ranks = ", ".join(f"{kind} {median_and_quartiles(model, kind)}" for kind in STABLE_RANK_KINDS)
        lines.append(f"{model.model}: {stable_ranks} ({model.seconds:g} s)")
    return document, [*lines, f"report: {files['report']}"]


def _fields(fields: Mapping[str, object]) -> list[str]:
    width = max(map(len, fields)) + 1
    return [f"{f'{name}:'.ljust(width)}  {value}" for name, value in fields.items()]


def _texts(tokens: Iterable[ScoredToken]) -> list[str]:
    return [token.text for token in tokens]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
