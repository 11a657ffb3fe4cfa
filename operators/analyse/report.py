"""The pages: what was found in one prompt, and over many phrases and models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from statistics import median, quantiles
from typing import Literal

from operators.analyse.canvas import Picture
from operators.analyse.page import cards, chip, chips, figure, number, page, table
from operators.analyse.plots import short
from operators.analyse.results import Analysis, Comparison, ModelSummary
from operators.analyse.tokens import visible

_PAPER = "J. R. Golden, Equivalent Linear Mappings of Large Language Models, TMLR 2025, arXiv 2505.24293"
_SHOWN = 6
_LONG_TITLE = 120


def analysis_page(analysis: Analysis, pictures: Mapping[str, Picture]) -> str:
    """One prompt as a page. ``pictures`` are those of ``plots.analysis_plots``."""
    return page(f"Analysis: {visible(analysis.text)}", _analysis(analysis, pictures))


def comparison_page(comparison: Comparison, pictures: Mapping[str, Picture]) -> str:
    """A comparison as a page. ``pictures`` are those of ``plots.comparison_plots``."""
    return page(f"Comparison of {len(comparison.models)} models", _comparison(comparison, pictures))


def layer_name(layer: int | None) -> str:
    """A layer as a card shows it."""
    return "never" if layer is None else f"from layer {layer}"


def _analysis(found: Analysis, pictures: Mapping[str, Picture]) -> Iterator[str]:
    answer = found.answer[0]
    size = ' class="long"' if len(found.text) > _LONG_TITLE else ""
    yield f"<h1{size}>“{escape(visible(found.text).replace('␣', ' '))}” {chip(answer, hit=True)}</h1>"
    yield (
        f'<p class="meta">{escape(found.model)} · {escape(found.architecture)} · {found.num_layers} layers, '
        f"d = {found.hidden_size} · {escape(found.dtype)} · {len(found.positions)} tokens · {found.seconds:.0f} s</p>"
    )
    yield _headlines(found)
    yield (
        "<p>At one prompt the model is a linear map of its token embeddings x<sub>i</sub>: with norms, gates and "
        "attention weights frozen at their values, h = Σ<sub>i</sub> J<sub>i</sub> x<sub>i</sub> + c exactly. "
        "J<sub>i</sub> is a d × d matrix per position, c comes from biases alone. "
        "All numbers below are dimensionless unless their caption says otherwise.</p>"
    )
    yield "<h2>Reconstruction</h2>"
    yield figure(
        pictures["reconstruction"],
        says="Scatter plots of reconstructed against actual components of the output embedding",
        caption=f"Each point is one of the d = {found.hidden_size} components of h, the final norm’s output at the "
        f"last position of layer {found.layer}; the line is equality. Left: the detached map gives h back up to "
        "rounding. Right: the same sum with the ordinary Jacobian does not, because the model is not linear.",
    )
    yield from _positions(found, pictures)
    yield from _layers(found, pictures)
    rules = f"Rule set {escape(found.rule_set)}, schema {escape(found.schema)}."
    yield f'<p class="note">After {escape(_PAPER)}. {rules}</p>'


def _headlines(found: Analysis) -> str:
    answer = found.answer[0]
    return cards(
        [
            (f"next token, with probability {number(answer.score)}", chip(answer, hit=True)),
            ("relative error ‖Σ J x + c − h‖ / ‖h‖, detached map", number(found.reconstruction.detached_error, 2)),
            ("the same with the ordinary Jacobian", number(found.reconstruction.ordinary_error, 2)),
            ("stable rank of the first position’s J", number(found.positions[0].stable_rank)),
            ("stable rank of the last position’s J", number(found.positions[-1].stable_rank)),
            ("mean stable rank over positions", number(found.mean_stable_rank)),
            ("the answer leads the stream (logit lens)", layer_name(found.emergence.stream)),
            ("the answer leads u₁ of the last position", layer_name(found.emergence.last)),
        ]
    )


def _positions(found: Analysis, pictures: Mapping[str, Picture]) -> Iterator[str]:
    yield "<h2>Position by position</h2>"
    yield figure(
        pictures["spectra"],
        says="Singular values of each position's map on logarithmic axes",
        caption="All singular values σ<sub>k</sub> of each J<sub>i</sub>, largest first, both axes logarithmic. A line "
        "that falls steeply at the left is a map of few directions.",
    )
    yield figure(
        pictures["positions"],
        says="Bars of stable rank and of share in the output, per position",
        caption="Top: the stable rank ‖J‖²<sub>F</sub>/σ₁² counts the directions that matter; 1 is the least. Bottom: "
        "the part of h that comes from each position, (h · J<sub>i</sub> x<sub>i</sub>) / ‖h‖² in per cent; "
        + (f"with the {100 * found.offset_share:.2g} % of c " if found.offset_share else "")
        + "the parts add up to 100.",
    )
    yield "<h3>What the singular vectors say</h3>"
    yield (
        "<p>v₁, the input direction that J<sub>i</sub> amplifies most, is compared with all token embeddings (cosine). "
        "u₁, the output direction it is sent to, is read through the unembedding (logits). The sign of a pair is the "
        "one for which the token’s own embedding lies on the side of v, so that u is where the prompt really goes. "
        "The model’s next token is marked. ␣ is a space, ⏎ a line break, ⇥ a tab; a token that is only part of a "
        "character is shown as its vocabulary entry.</p>"
    )
    heads = ["i", "token", "stable rank", "σ₁", "v₁: reads", "u₁: writes"]
    hit = found.answer[0].id
    rows = []
    others = []
    for position in found.positions:
        start = [str(position.index), chip(position.token)]
        for k, direction in enumerate(position.directions):
            said = [chips(direction.right[:_SHOWN]), chips(direction.left[:_SHOWN], hit=hit)]
            if k == 0:
                rows.append([*start, number(position.stable_rank), number(direction.sigma), *said])
            else:
                others.append([*start, str(k + 1), number(direction.sigma), *said])
    yield table(heads, rows, numbers=(0, 2, 3))
    if others:
        yield "<details><summary>The second and third singular vectors</summary>"
        yield table(["i", "token", "k", "σₖ", "vₖ: reads", "uₖ: writes"], others, numbers=(0, 2, 3))
        yield "</details>"


def _layers(found: Analysis, pictures: Mapping[str, Picture]) -> Iterator[str]:
    yield "<h2>Layer by layer</h2>"
    yield figure(
        pictures["emergence"],
        says="Rank of the answer among all tokens, per layer",
        caption="Where the answer appears. Circles: the model’s own head on the stream h<sup>(s)</sup> of the last "
        "position (logit lens). Squares and triangles: the top left singular vector u₁ of the map from the last and "
        "from the first token’s embedding to h<sup>(s)</sup>, through the final norm’s weight and the unembedding. "
        f"The answer leads for good in the stream: {layer_name(found.emergence.stream)}; in u₁ of the last position: "
        f"{layer_name(found.emergence.last)}; of the first: {layer_name(found.emergence.first)}.",
    )
    yield figure(
        pictures["dimensions"],
        says="Stable rank of cumulative and single-layer maps, per layer",
        caption="Stable rank of the maps into the last position’s block output h<sup>(s)</sup>, attention "
        "contribution a<sup>(s)</sup> and MLP contribution m<sup>(s)</sup>, with h<sup>(s)</sup> = h<sup>(s−1)</sup> + "
        "a<sup>(s)</sup> + m<sup>(s)</sup>. Left: from the embedding of the last (top) or first (bottom) token on. "
        "Right: from that position’s input of the layer itself. Vertical axes are logarithmic and differ.",
    )
    yield figure(
        pictures["stream"],
        says="Norms in the residual stream and projections on the last layer",
        caption="Left: Euclidean norms of the stream and of what attention and MLP add to it, logarithmic, in the "
        "stream’s own units. Right: how far the stream, and u₁ of the last position’s cumulative map, already point "
        "where they will at layer L; u₂ is the second singular vector there.",
    )
    heads = ["s", "stream (logit lens)", "rank", "u₁, last position", "rank", "u₁, first position", "stable rank, last"]
    hit = found.answer[0].id
    rows = []
    for layer in found.layers:
        last = layer.map("cumulative", "block", "last")
        first = layer.map("cumulative", "block", "first")
        rows.append(
            [
                str(layer.index),
                chips(layer.lens[:3], hit=hit),
                str(layer.lens_answer_rank),
                chips(last.left[:4], hit=hit),
                "–" if last.answer_rank is None else str(last.answer_rank),
                chips(first.left[:4], hit=hit),
                number(last.stable_rank),
            ]
        )
    yield "<h3>What each layer would say</h3>"
    yield (
        "<p>The top tokens of the stream and of u₁ of the cumulative map, and the rank of the model’s next token "
        f"{chip(found.answer[0], hit=True)} among all tokens.</p>"
    )
    yield table(heads, rows, numbers=(0, 2, 4, 6))
    yield "<details><summary>What attention and MLP of each layer write, on their own</summary>"
    yield (
        "<p>u₁ of the single-layer maps at the last position: the direction that each part adds most readily, "
        "given its own layer’s input.</p>"
    )
    parts = [[layer.map("single", target, "last") for target in ("attention", "mlp")] for layer in found.layers]
    yield table(
        ["s", "attention: σ₁", "attention: u₁ writes", "MLP: σ₁", "MLP: u₁ writes"],
        [
            [str(i), *(cell for part in pair for cell in (number(part.sigma), chips(part.left[:5], hit=hit)))]
            for i, pair in enumerate(parts, start=1)
        ],
        numbers=(0, 1, 3),
    )
    yield "</details>"


def _comparison(comparison: Comparison, pictures: Mapping[str, Picture]) -> Iterator[str]:
    yield f"<h1>{len(comparison.phrases)} phrases, {len(comparison.models)} models</h1>"
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
    yield table(heads, [_summary(model) for model in comparison.models], numbers=range(2, 8))
    yield '<p class="note">Median over phrases, with the middle half in brackets.</p>'
    yield figure(
        pictures["stable-ranks"],
        says="Distributions of stable rank over phrases, per model",
        caption="Each point is one phrase; the box holds the middle half, its line the median, the whiskers the rest "
        "within 1.5 box lengths. The vertical axes are logarithmic and differ.",
    )
    for model in comparison.models:
        yield f"<h2>{escape(short(model.model))}</h2>"
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
    yield f'<p class="note">After {escape(_PAPER)}. Schema {escape(comparison.schema)}.</p>'


def _summary(model: ModelSummary) -> list[str]:
    return [
        escape(short(model.model)),
        escape(model.architecture),
        str(model.num_layers),
        str(model.hidden_size),
        *(spread(model, kind) for kind in ("first", "last", "mean")),
        f"{model.seconds:.0f}",
    ]


def spread(model: ModelSummary, kind: Literal["first", "last", "mean"]) -> str:
    """Median and quartiles of one kind of stable rank over the phrases."""
    values = model.values(kind)
    if len(values) < 2:
        return number(values[0] if values else None)
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{number(median(values))} [{number(low)}–{number(high)}]"
