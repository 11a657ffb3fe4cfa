"""The HTML report of one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

from operators.analyse.canvas import ThemedImage
from operators.analyse.page import PAPER, cards, chip, chips, figure, number, page, table
from operators.analyse.results import Analysis
from operators.analyse.tokens import visible

_TOKENS_SHOWN = 6
_LONG_TITLE = 120


def analysis_page(analysis: Analysis, images: Mapping[str, ThemedImage]) -> str:
    """One prompt as a page. ``images`` are those of ``plots.analysis_plots``."""
    return page(f"Analysis: {visible(analysis.text)}", _body(analysis, images))


def emergence_text(layer: int | None) -> str:
    """Since when the answer leads, of a field of :class:`~operators.analyse.results.Emergence`."""
    return "never" if layer is None else f"from layer {layer}"


def _body(analysis: Analysis, images: Mapping[str, ThemedImage]) -> Iterator[str]:
    answer = analysis.answer[0]
    size = ' class="long"' if len(analysis.text) > _LONG_TITLE else ""
    yield f"<h1{size}>“{escape(visible(analysis.text).replace('␣', ' '))}” {chip(answer, hit=True)}</h1>"
    yield (
        f'<p class="meta">{escape(analysis.model)} · {escape(analysis.architecture)} · {analysis.num_layers} layers, '
        f"d = {analysis.hidden_size} · {escape(analysis.dtype)} · {len(analysis.positions)} tokens · "
        f"{analysis.seconds:.0f} s</p>"
    )
    yield _headlines(analysis)
    yield (
        "<p>At one prompt the model is a linear map of its token embeddings x<sub>i</sub>: with norms, gates and "
        "attention weights frozen at their values, h = Σ<sub>i</sub> J<sub>i</sub> x<sub>i</sub> + c exactly. "
        "J<sub>i</sub> is a d × d matrix per position, c comes from biases alone. "
        "All numbers below are dimensionless unless their caption says otherwise.</p>"
    )
    yield "<h2>Reconstruction</h2>"
    yield figure(
        images["reconstruction"],
        alt="Scatter plots of reconstructed against actual components of the output embedding",
        caption=f"Each point is one of the d = {analysis.hidden_size} components of h, the final norm’s output at the "
        f"last position of layer {analysis.layer}; the line is equality. Left: the detached map gives h back up to "
        "rounding. Right: the same sum with the ordinary Jacobian does not, because the model is not linear.",
    )
    yield from _positions(analysis, images)
    yield from _layers(analysis, images)
    rules = f"Rule set {escape(analysis.rule_set)}, schema {escape(analysis.schema)}."
    yield f'<p class="note">After {escape(PAPER)}. {rules}</p>'


def _headlines(analysis: Analysis) -> str:
    answer = analysis.answer[0]
    return cards(
        [
            (f"next token, with probability {number(answer.score)}", chip(answer, hit=True)),
            ("relative error ‖Σ J x + c − h‖ / ‖h‖, detached map", number(analysis.reconstruction.detached_error, 2)),
            ("the same with the ordinary Jacobian", number(analysis.reconstruction.ordinary_error, 2)),
            ("stable rank of the first position’s J", number(analysis.positions[0].stable_rank)),
            ("stable rank of the last position’s J", number(analysis.positions[-1].stable_rank)),
            ("mean stable rank over positions", number(analysis.mean_stable_rank)),
            ("the answer leads the stream (logit lens)", emergence_text(analysis.emergence.stream)),
            ("the answer leads u₁ of the last position", emergence_text(analysis.emergence.last)),
        ]
    )


def _positions(analysis: Analysis, images: Mapping[str, ThemedImage]) -> Iterator[str]:
    yield "<h2>Position by position</h2>"
    yield figure(
        images["spectra"],
        alt="Singular values of each position's map on logarithmic axes",
        caption="All singular values σ<sub>k</sub> of each J<sub>i</sub>, largest first, both axes logarithmic. A line "
        "that falls steeply at the left is a map of few directions.",
    )
    yield figure(
        images["positions"],
        alt="Bars of stable rank and of share in the output, per position",
        caption="Top: the stable rank ‖J‖²<sub>F</sub>/σ₁² counts the directions that matter; 1 is the least. Bottom: "
        "the part of h that comes from each position, (h · J<sub>i</sub> x<sub>i</sub>) / ‖h‖² in per cent; "
        + (f"with the {100 * analysis.offset_share:.2g} % of c " if analysis.offset_share else "")
        + "the parts add up to 100.",
    )
    yield from _reads(analysis)
    yield "<h3>What the singular vectors say</h3>"
    yield (
        "<p>v₁, the input direction that J<sub>i</sub> amplifies most, is compared with all token embeddings (cosine). "
        "u₁, the output direction it is sent to, is read through the unembedding (logits). The sign of a pair is the "
        "one for which the token’s own embedding lies on the side of v, so that u is where the prompt really goes. "
        "The model’s next token is marked. ␣ is a space, ⏎ a line break, ⇥ a tab; a token that is only part of a "
        "character is shown as its vocabulary entry.</p>"
    )
    heads = ["i", "token", "stable rank", "σ₁", "v₁: reads", "u₁: writes"]
    hit = analysis.answer[0].id
    rows = []
    others = []
    for position in analysis.positions:
        start = [str(position.index), chip(position.token)]
        for k, direction in enumerate(position.directions):
            tokens = [chips(direction.right[:_TOKENS_SHOWN]), chips(direction.left[:_TOKENS_SHOWN], hit=hit)]
            if k == 0:
                rows.append([*start, number(position.stable_rank), number(direction.sigma), *tokens])
            else:
                others.append([*start, str(k + 1), number(direction.sigma), *tokens])
    yield table(heads, rows, numbers=(0, 2, 3))
    if others:
        yield "<details><summary>The second and third singular vectors</summary>"
        yield table(["i", "token", "k", "σₖ", "vₖ: reads", "uₖ: writes"], others, numbers=(0, 2, 3))
        yield "</details>"


def _reads(analysis: Analysis) -> Iterator[str]:
    yield "<h3>What the prompt reads, and what each token gives</h3>"
    yield (
        "<p>w = J<sub>n−1</sub><sup>⊤</sup> h/‖h‖ against all token embeddings x: w · x says how far a token in "
        "the last place would move the output along h. An operator of this text reads the same. Terms are "
        "J<sub>i</sub> x<sub>i</sub>; norms are in the units of h.</p>"
    )
    yield table(
        ["", "tokens, best first"],
        [["along h", chips(analysis.reads)], ["away from h", chips(analysis.reads_against)]],
        numbers=(),
    )
    yield table(
        ["i", "token", "‖J<sub>i</sub> x<sub>i</sub>‖", "cosine with h", "share of h"],
        [
            [str(p.index), chip(p.token), number(p.term_norm), f"{p.term_cosine:.2f}", f"{p.share:.1%}"]
            for p in analysis.positions
        ],
        numbers=(0, 2, 3, 4),
    )


def _layers(analysis: Analysis, images: Mapping[str, ThemedImage]) -> Iterator[str]:
    leads = analysis.emergence
    yield "<h2>Layer by layer</h2>"
    yield figure(
        images["emergence"],
        alt="Rank of the answer among all tokens, per layer",
        caption="Where the answer appears. Circles: the model’s own head on the stream h<sup>(s)</sup> of the last "
        "position (logit lens). Squares and triangles: the top left singular vector u₁ of the map from the last and "
        "from the first token’s embedding to h<sup>(s)</sup>, through the final norm’s weight and the unembedding. "
        f"The answer leads for good in the stream: {emergence_text(leads.stream)}; in u₁ of the "
        f"last position: {emergence_text(leads.last)}; of the first: {emergence_text(leads.first)}.",
    )
    yield figure(
        images["dimensions"],
        alt="Stable rank of cumulative and single-layer maps, per layer",
        caption="Stable rank of the maps into the last position’s block output h<sup>(s)</sup>, attention "
        "contribution a<sup>(s)</sup> and MLP contribution m<sup>(s)</sup>, with h<sup>(s)</sup> = h<sup>(s−1)</sup> + "
        "a<sup>(s)</sup> + m<sup>(s)</sup>. Left: from the embedding of the last (top) or first (bottom) token on. "
        "Right: from that position’s input of the layer itself. Vertical axes are logarithmic and differ.",
    )
    yield figure(
        images["stream"],
        alt="Norms in the residual stream and projections on the last layer",
        caption="Left: Euclidean norms of the stream and of what attention and MLP add to it, logarithmic, in the "
        "stream’s own units. Right: how far the stream, and u₁ of the last position’s cumulative map, already point "
        "where they will at layer L; u₂ is the second singular vector there.",
    )
    heads = ["s", "stream (logit lens)", "rank", "u₁, last position", "rank", "u₁, first position", "stable rank, last"]
    hit = analysis.answer[0].id
    rows = []
    for layer in analysis.layers:
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
        f"{chip(analysis.answer[0], hit=True)} among all tokens.</p>"
    )
    yield table(heads, rows, numbers=(0, 2, 4, 6))
    yield "<details><summary>What attention and MLP of each layer write, on their own</summary>"
    yield (
        "<p>u₁ of the single-layer maps at the last position: the direction that each part adds most readily, "
        "given its own layer’s input.</p>"
    )
    parts = [[layer.map("single", target, "last") for target in ("attention", "mlp")] for layer in analysis.layers]
    yield table(
        ["s", "attention: σ₁", "attention: u₁ writes", "MLP: σ₁", "MLP: u₁ writes"],
        [
            [str(i), *(cell for part in pair for cell in (number(part.sigma), chips(part.left[:5], hit=hit)))]
            for i, pair in enumerate(parts, start=1)
        ],
        numbers=(0, 1, 3),
    )
    yield "</details>"
