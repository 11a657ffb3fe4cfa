"""All about one operator of the store."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from steer_client._cli.tables import wide_console
from steer_client._cli.words import count, number, visible
from steer_client._store import Calibration, OperatorInfo


def show_operator(info: OperatorInfo) -> None:
    """Prints a line for each thing that is known of an operator, or its problem."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for title, text in _lines(info):
        table.add_row(title, Text(visible(text)))
    wide_console().print(table)


def _lines(info: OperatorInfo) -> Iterator[tuple[str, str]]:
    yield "name", info.name
    if info.problem is not None:
        yield "problem", info.problem
        return
    yield from _texts(info)
    for member in info.members:
        yield "member", f"{member.name}, weight {number(member.weight)}, {member.digest}"
    yield "layer", f"{info.injection_layer}, profile {info.profile}"
    yield "rank", _rank(info)
    yield (
        "recommended",
        (
            f"strength {number(info.recommended_strength)}, blend {number(info.recommended_blend)}, "
            f"{info.recommended_rule}{', calibrated' if info.calibrated else ', not calibrated'}"
        ),
    )
    if info.calibration is not None:
        yield "calibration", _calibration(info.calibration)
    yield "reconstruction", f"relative error {number(info.reconstruction_error)}, model in {info.model_dtype}"
    yield "model", f"{info.model}, {info.model_fingerprint}"
    yield "digest", info.digest
    yield "file", f"{info.size_bytes} bytes, {info.dtype}"
    if info.created is not None:
        yield "built", f"{info.created.isoformat()} by {info.builder_version}, rules {info.rule_set}"


def _texts(info: OperatorInfo) -> Iterator[tuple[str, str]]:
    yield "concept", _text(info.concept, len(info.concept_token_ids), info.concept_weight)
    for more in info.more_texts:
        yield "further text", _text(more.text, len(more.token_ids), more.weight)
    left = info.num_texts - 1 - len(info.more_texts)
    if left:
        yield "", f"and {count(left, 'text')} that the server does not send"


def _text(text: str, tokens: int, weight: float) -> str:
    return f"{text!r}, {count(tokens, 'token')}, weight {number(weight)}"


def _rank(info: OperatorInfo) -> str:
    size = f"{count(info.positions, 'block')} at hidden size {info.hidden_size}"
    if info.low_rank is None:
        return f"exact, {size}"
    low = info.low_rank
    return (
        f"{info.rank}, {size}, residual {number(low.min_residual)} to {number(low.max_residual)}, "
        f"{low.weighting} weighting"
    )


def _calibration(calibration: Calibration) -> str:
    point = calibration.recommended
    size = f"{count(calibration.prompts, 'prompt')}, {count(calibration.tokens, 'token')} each"
    if point is None:
        return f"the recommended setting is none of those measured ({size})"
    return (
        f"hit rate {number(point.hit_rate)} (plain {number(calibration.plain_hit_rate)}), "
        f"KL p95 {number(point.kl_p95)} nats of {number(calibration.kl_budget)}, "
        f"perplexity × {number(point.perplexity_ratio)} of {number(calibration.max_perplexity_ratio)}, "
        f"distinct-2 {number(point.distinct_2)} ({size})"
    )
