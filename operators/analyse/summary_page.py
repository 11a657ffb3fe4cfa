"""The HTML report of several models over many phrases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from statistics import median, quantiles

from operators.analyse.canvas import ThemedImage, short_name
from operators.analyse.page import PAPER, chip, chips, figure, number, page, table
from operators.analyse.results import STABLE_RANK_KINDS, ModelSummaries, ModelSummary, StableRankKind


def summary_page(summaries: ModelSummaries, images: Mapping[str, ThemedImage]) -> str:
    """Several models as a page. ``images`` are those of ``summary_plots.summary_plots``."""
    return page(f"Comparison of {len(summaries.models)} models", _body(summaries, images))


def _body(summaries: ModelSummaries, images: Mapping[str, ThemedImage]) -> Iterator[str]:
    yield f"<h1>{len(summaries.phrases)} phrases, {len(summaries.models)} models</h1>"
    yield (
        "<p>The map from each token’s embedding to the output embedding, J<sub>i</sub>, and its stable rank "
        "‖J‖²<sub>F</sub>/σ₁²: 1 where one direction is all, d where all count alike. Estimated from sketches, "
        "to about five per cent.</p>"
    )
    heads = [
        "model",
        "architecture",
        "layers",
        "d",
        "first position",
        "last position",
        "mean over positions",
        "seconds",
    ]
    yield table(heads, [_table_row(model) for model in summaries.models], numbers=range(2, 8))
    yield '<p class="note">Median over phrases, with the middle half in brackets.</p>'
    yield figure(
        images["stable-ranks"],
        alt="Distributions of stable rank over phrases, per model",
        caption="Each point is one phrase; the box holds the middle half, its line the median, the whiskers the rest "
        "within 1.5 box lengths. The vertical axes are logarithmic and differ.",
    )
    for model in summaries.models:
        yield f"<h2>{escape(short_name(model.model))}</h2>"
        yield f'<p class="meta">{escape(model.model)} · {escape(model.dtype)}</p>'
        yield table(
            [
                "phrase",
                "next token",
                "first",
                "last",
                "mean",
                "v₁, last: reads",
                "u₁, last: writes",
                "u₁, first: writes",
            ],
            [
                [
                    escape(phrase.text),
                    chip(phrase.answer[0], hit=True),
                    number(phrase.first),
                    number(phrase.last),
                    number(phrase.mean),
                    chips(phrase.last_right[:3]),
                    chips(phrase.last_left[:4], hit=phrase.answer[0].id),
                    chips(phrase.first_left[:4], hit=phrase.answer[0].id),
                ]
                for phrase in model.phrases
            ],
            numbers=(2, 3, 4),
        )
    yield f'<p class="note">After {escape(PAPER)}. Schema {escape(summaries.schema)}.</p>'


def _table_row(model: ModelSummary) -> list[str]:
    return [
        escape(short_name(model.model)),
        escape(model.architecture),
        str(model.num_layers),
        str(model.hidden_size),
        *(median_and_quartiles(model, kind) for kind in STABLE_RANK_KINDS),
        f"{model.seconds:.0f}",
    ]


def median_and_quartiles(model: ModelSummary, kind: StableRankKind) -> str:
    """Median and quartiles of one kind of stable rank over the phrases, as ``median [low–high]``."""
    values = model.stable_ranks(kind)
    if len(values) < 2:
        return number(values[0] if values else None)
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{number(median(values))} [{number(low)}–{number(high)}]"
