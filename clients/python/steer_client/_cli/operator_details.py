"""One operator of the store, a line for each field."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

import steer_client
from steer_client._cli.console import field_table, wide_console
from steer_client._cli.formatting import (
    anchor_part,
    escape_controls,
    format_count,
    format_number,
    layer_part,
    positions_part,
)


def show_operator(info: steer_client.OperatorInfo) -> None:
    """Prints all fields of an operator, or of an unusable one its name and its problem."""
    table = field_table()
    for title, text in _lines(info):
        table.add_row(title, Text(escape_controls(text)))
    wide_console().print(table)


def _lines(info: steer_client.OperatorInfo) -> Iterator[tuple[str, str]]:
    yield "name", info.name
    if info.problem is not None:
        yield "problem", info.problem
        return
    yield from _texts(info)
    for member in info.members:
        yield "member", f"{member.name}, weight {format_number(member.weight)}, {member.digest}"
    yield "layer", f"{layer_part(info.layer, info.injection_layer)}, profile {info.profile}"
    yield "rank", _rank(info)
    yield (
        "recommended",
        (
            f"strength {format_number(info.recommended_strength)}, blend {format_number(info.recommended_blend)}, "
            f"{info.recommended_rule}"
            f"{anchor_part(info.recommended_blend, info.recommended_anchor, info.recommended_first_token)}"
            f"{positions_part(info.recommended_positions)}"
            f"{', calibrated' if info.calibrated else ', not calibrated'}"
        ),
    )
    if info.neutral is not None:
        yield "neutral", f"mean of {format_count(info.neutral.texts, 'text')}, {info.neutral.digest}"
    if info.calibration is not None:
        yield "calibration", _calibration(info.calibration)
        if info.calibration.held_out is not None:
            yield "held out", _held_out(info.calibration.held_out)
        if info.calibration.sampling is not None:
            yield "sampling", f"as calibrated: {_sampling(info.calibration.sampling)}"
    for point in info.curve:
        yield "dose", _dose(point)
    if info.rank:
        yield (
            "reconstruction",
            f"relative error {format_number(info.reconstruction_error)}, model in {info.model_dtype}"
            f"{f', attention {info.attention}' if info.attention else ''}",
        )
    yield "model", f"{info.model}, {info.model_fingerprint}"
    yield "digest", info.digest
    yield "file", f"{info.size_bytes} bytes, {info.dtype}"
    if info.created is not None:
        rules = f", rules {info.rule_set}" if info.rule_set else ""
        yield "built", f"{info.created.isoformat()} by {info.builder_version}{rules}"


def _texts(info: steer_client.OperatorInfo) -> Iterator[tuple[str, str]]:
    if not info.rank:
        yield "concept", repr(info.concept)
        return
    yield "concept", _concept_text(info.concept, len(info.concept_token_ids), info.concept_weight)
    for further in info.more_texts:
        yield "further text", _concept_text(further.text, len(further.token_ids), further.weight)
    unsent = info.num_texts - 1 - len(info.more_texts)
    if unsent:
        yield "", f"and {format_count(unsent, 'text')} that the server does not send"


def _concept_text(text: str, tokens: int, weight: float) -> str:
    return f"{text!r}, {format_count(tokens, 'token')}, weight {format_number(weight)}"


def _rank(info: steer_client.OperatorInfo) -> str:
    if info.lens is not None:
        read_from = f"read from {info.lens.read_from} positions of {format_count(info.lens.texts, 'text')}"
        return f"0: a lens for words at hidden size {info.hidden_size}, {read_from}"
    if info.vector:
        return f"0: a vector at hidden size {info.hidden_size}"
    size = f"{format_count(info.positions, 'block')} at hidden size {info.hidden_size}"
    if info.low_rank is None:
        return f"exact, {size}"
    low = info.low_rank
    return (
        f"{info.rank}, {size}, residual {format_number(low.min_residual)} to {format_number(low.max_residual)}, "
        f"{low.weighting} weighting"
    )


def _dose(point: steer_client.DosePoint) -> str:
    mean = "" if point.kl_mean is None else f", mean {format_number(point.kl_mean)}"
    useful = "" if point.useful_rate is None else f", useful {format_number(point.useful_rate)}"
    return (
        f"strength {format_number(point.strength)}: KL p95 {format_number(point.kl_p95)}{mean} nats, "
        f"hits {format_number(point.hit_rate)}{useful}"
    )


def _calibration(calibration: steer_client.Calibration) -> str:
    point = calibration.recommended
    size = f"{format_count(calibration.prompts, 'prompt')}, {format_count(calibration.tokens, 'token')} each"
    if point is None:
        return f"the recommended setting is none of those measured ({size})"
    return (
        f"hit rate {format_number(point.hit_rate)} (plain {format_number(calibration.plain_hit_rate)}), "
        f"KL p95 {format_number(point.kl_p95)} nats of {format_number(calibration.kl_budget)}, "
        f"perplexity × {format_number(point.perplexity_ratio)} of {format_number(calibration.max_perplexity_ratio)}, "
        f"distinct-2 {format_number(point.distinct_2)} ({size})"
    )


def _held_out(held_out: steer_client.HeldOut) -> str:
    low, high = format_number(held_out.useful_low), format_number(held_out.useful_high)
    return (
        f"useful {format_number(held_out.useful_rate)} [{low}, {high}] (plain "
        f"{format_number(held_out.plain_useful_rate)}) on {format_count(held_out.prompts, 'prompt')}, KL p95 "
        f"{format_number(held_out.kl_p95)}, mean {format_number(held_out.kl_mean)}"
    )


def _sampling(sampling: steer_client.SamplingParams) -> str:
    names = ("temperature", "top_p", "repetition_penalty", "seed")
    given = {name: value for name in names if (value := getattr(sampling, name)) is not None}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
