"""The A/B: one prompt, a plain row and a row per steered arm, decoded in one batch and then compared."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from operators.core.statistics import percentile, perplexity_of
from steer_server.caps import NO_CAPS, Caps
from steer_server.engine.base import Engine
from steer_server.errors import InvalidRequestError
from steer_server.generate import CompletionBuilder, check_plan
from steer_server.registry import Registry
from steer_server.token_report import check_figures, token_comparisons, token_texts, work_out
from steer_server.types import (
    NORMAL,
    Admitted,
    ArmEvent,
    Compared,
    CompareEvent,
    CompareRequest,
    Comparison,
    Completion,
    DecodeJob,
    Report,
    Row,
    SamplingParams,
    Score,
    SteeringPlan,
    TokenReport,
)


@dataclass(frozen=True)
class _Text:
    """One text of a comparison."""

    arm: str
    sample: int
    row: Row


async def compare(
    engine: Engine,
    registry: Registry,
    request: CompareRequest,
    *,
    max_arms: int,
    caps: Caps = NO_CAPS,
) -> AsyncGenerator[CompareEvent, None]:
    """Events of every arm as they come, the plain arm's under the name "normal"; at the end the comparisons.

    Raises any :class:`~steer_server.errors.SteerServerError`; closing the iterator early stops the work.
    """
    check_size(request, max_arms)
    sampling = caps.apply(request.sampling)
    operators = {f"arms[{index}].operators": arm.operators for index, arm in enumerate(request.arms)}
    plans = await registry.plan_beside(operators)
    report = await work_out(request.report, engine.tokenizer)
    texts = tuple(_texts(request, sampling, plans, report))
    caps.check_tokens([text.row for text in texts])
    if report is not None:
        tokens = sum(text.row.sampling.max_tokens for text in texts if text.row.report is not None)
        check_figures(request.report, tokens, "report")
    ids = await engine.encode(request.prompt)
    for field, plan, arm in zip(operators, plans, request.arms, strict=True):
        max_tokens = (arm.sampling or sampling).max_tokens
        check_plan(engine.model, plan, field, prompt_tokens=len(ids), max_tokens=max_tokens)
    builders = [
        CompletionBuilder(request.request_id, len(ids), text.row.sampling, text.row.plan, sample=text.sample)
        for text in texts
    ]
    completions: dict[tuple[str, int], Completion] = {}
    stream = engine.submit(DecodeJob(ids, tuple(text.row for text in texts), sampling.time_limit))
    try:
        for text, builder in zip(texts, builders, strict=True):
            yield ArmEvent(text.arm, builder.started(ids))
        async for event in stream:
            places = range(len(texts)) if isinstance(event, Admitted) else (event.row,)
            for place in places:
                for result in builders[place].add(event):
                    if isinstance(result, Completion):
                        completions[texts[place].arm, result.sample] = result
                    yield ArmEvent(texts[place].arm, result)
        compared = tuple(
            compare_completions(completions.get((NORMAL, text.sample)), completions[text.arm, text.sample], text.arm)
            for text in texts
            if text.arm != NORMAL
        )
        if request.report is not None:
            compared = await _reported(compared, completions, request.report, engine.tokenizer)
        yield Compared(compared)
    finally:
        stream.cancel()


def check_size(request: CompareRequest, max_arms: int) -> None:
    """Raises :class:`InvalidRequestError` for more texts of a prompt than are accepted."""
    num_arms = len(request.arms)
    if num_arms + request.normal > max_arms + 1:
        accepted = max_arms + (not request.normal)
        raise InvalidRequestError("arms", f"has {num_arms} arms; at most {accepted} are accepted")
    num_texts = (num_arms + request.normal) * request.n
    if num_texts > max_arms + 1:
        raise InvalidRequestError(
            "n", f"is {request.n}, which makes {num_texts} texts of a prompt; at most {max_arms + 1} are accepted"
        )


async def _reported(
    compared: Sequence[Comparison],
    completions: Mapping[tuple[str, int], Completion],
    report: TokenReport,
    tokenizer: Any,
) -> tuple[Comparison, ...]:
    """The comparisons with what is to be said of every token."""
    texts = [completions[each.arm, each.sample] for each in compared]
    known = await token_texts(texts, tokenizer)
    return tuple(
        replace(each, tokens=token_comparisons(text, report, known)) for each, text in zip(compared, texts, strict=True)
    )


def _texts(
    request: CompareRequest, sampling: SamplingParams, plans: Sequence[SteeringPlan | None], report: Report | None
) -> Iterator[_Text]:
    """Every text of a prompt, the plain ones first.

    Scoring a plain row gives its own log-probabilities, and so its perplexity.
    """
    rows = [(NORMAL, Row(None, request.score, sampling))] if request.normal else []
    for index, (arm, plan) in enumerate(zip(request.arms, plans, strict=True)):
        own = arm.sampling
        row = Row(plan, request.score, sampling, report=report)
        if own is not None:
            row = replace(row, sampling=own.within(sampling), sampling_field=f"arms[{index}].sampling")
        rows.append((arm.name, row))
    for name, row in rows:
        for sample in range(request.n):
            yield _Text(name, sample, replace(row, sampling=row.sampling.of_sample(sample)))


def compare_completions(normal: Completion | None, steered: Completion, arm: str) -> Comparison:
    """Where two texts diverge, KL(plain || steered) per token in nats, and their perplexities under the plain model."""
    kl = tuple(score.kl for score in steered.scores)
    return Comparison(
        arm=arm,
        first_divergence=None if normal is None else first_divergence(normal.token_ids, steered.token_ids),
        kl_per_token=kl,
        kl_mean=math.fsum(kl) / len(kl) if kl else None,
        kl_p95=percentile(kl, 0.95) if kl else None,
        normal_perplexity=None if normal is None else perplexity(normal.scores),
        steered_perplexity=perplexity(steered.scores),
        sample=steered.sample,
    )


def first_divergence(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs: the shorter length where one begins the other; None where a equals b."""
    if a == b:
        return None
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def perplexity(scores: Sequence[Score]) -> float | None:
    """exp(-mean log p) under the plain model; None where nothing was scored."""
    return perplexity_of([score.plain_logprob for score in scores]) if scores else None
