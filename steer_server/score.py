"""A given text, read by a plain row and a row per steered arm in one batch: nothing is decoded."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace

from operators.core.statistics import percentile, perplexity_of
from steer_server.caps import NO_CAPS, Caps
from steer_server.engine.base import Engine
from steer_server.engine.prompts import check_ids
from steer_server.errors import EngineFailedError, InvalidRequestError, ShuttingDownError, TimeLimitError, errors_of
from steer_server.generate import CompletionBuilder, check_plan
from steer_server.registry import Registry
from steer_server.token_report import check_figures, token_comparisons, token_texts, work_out
from steer_server.types import (
    NORMAL,
    Admitted,
    ArmEvent,
    ArmScore,
    Completion,
    DecodeJob,
    FinishReason,
    Row,
    SamplingParams,
    ScoreEvent,
    ScoreRequest,
    TextScore,
    TokenReport,
)


async def score(
    engine: Engine,
    registry: Registry,
    request: ScoreRequest,
    *,
    max_arms: int,
    caps: Caps = NO_CAPS,
) -> AsyncGenerator[ScoreEvent, None]:
    """The start of every arm, then the score. Raises any :class:`~steer_server.errors.SteerServerError`."""
    if len(request.arms) > max_arms:
        raise InvalidRequestError("arms", f"has {len(request.arms)} arms; at most {max_arms} are accepted")
    with errors_of("sampling.time_limit", at="time_limit"):
        limited = caps.apply(SamplingParams(ignore_eos=True, time_limit=request.time_limit))
    operators = {f"arms[{index}].operators": arm.operators for index, arm in enumerate(request.arms)}
    plans = await registry.plan_beside(operators) if operators else ()
    prompt_ids, text_ids = await _read(engine, request)
    sampling = replace(limited, max_tokens=len(text_ids))
    report = await work_out(request.report, engine.tokenizer)
    rows = tuple(Row(plan, True, sampling, report=report) for plan in (None, *plans))
    check_figures(request.report, len(rows) * len(text_ids), "report" if report else request.text_field)
    with errors_of("sampling.max_tokens", at=request.text_field):
        caps.reserve_tokens(rows)
    for field, plan in zip(operators, plans, strict=True):
        check_plan(engine.model, plan, field, prompt_tokens=len(prompt_ids), max_tokens=len(text_ids))
    names = (NORMAL, *(arm.name for arm in request.arms))
    builders = [CompletionBuilder(request.request_id, len(prompt_ids), sampling, row.plan) for row in rows]
    done: dict[int, Completion] = {}
    with errors_of("sampling.max_tokens", at=request.text_field):
        stream = engine.submit(DecodeJob(prompt_ids, rows, sampling.time_limit, text_ids))
    try:
        for name, builder in zip(names, builders, strict=True):
            yield ArmEvent(name, builder.started(prompt_ids))
        async for event in stream:
            for place in range(len(rows)) if isinstance(event, Admitted) else (event.row,):
                for each in builders[place].add(event):
                    if isinstance(each, Completion):
                        done[place] = each
        for place in range(len(rows)):
            _check(done[place], text_ids, sampling.time_limit)
        texts = await token_texts(done.values(), engine.tokenizer)
        arms = tuple(arm_score(name, done[place], request.report, texts) for place, name in enumerate(names))
        yield TextScore(request.request_id, prompt_ids, text_ids, arms, done[0].timings)
    finally:
        stream.cancel()


def arm_score(arm: str, read: Completion, report: TokenReport | None, texts: Mapping[int, str]) -> ArmScore:
    """What a text is under one arm; ``texts``: of its tokens, and of those that are reported."""
    kl = [score.kl for score in read.scores]
    return ArmScore(
        arm=arm,
        tokens=token_comparisons(read, report, texts),
        kl_mean=math.fsum(kl) / len(kl),
        kl_p95=percentile(kl, 0.95),
        perplexity=perplexity_of([score.logprob for score in read.scores]),
        receipts=read.receipts,
    )


async def _read(engine: Engine, request: ScoreRequest) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of prompt and text. Raises :class:`InvalidRequestError` for a text that cannot be read behind it."""
    model, field = engine.model, request.text_field
    prompt = () if request.prompt is None else await engine.encode(request.prompt)
    if request.token_ids is not None:
        text = request.token_ids
        check_ids(field, text, model.vocab_size)
    else:
        text = await engine.encode_text(request.text or "", follows=bool(prompt))
    if len(prompt) + len(text) > model.context_length:
        behind = f" behind {len(prompt)} of the prompt" if prompt else ""
        raise InvalidRequestError(
            field, f"has {len(text)} tokens{behind}; the context of this model has {model.context_length} in all"
        )
    if prompt:
        return prompt, text
    if len(text) < 2:
        raise InvalidRequestError(field, "is one token without a prompt; the first token of all has no score")
    return text[:1], text[1:]


def _check(read: Completion, text: tuple[int, ...], time_limit: float | None) -> None:
    """Raises the error of a text that was not read to its end."""
    if read.finish_reason is FinishReason.TIME_LIMIT and time_limit is not None:
        raise TimeLimitError(time_limit)
    if read.finish_reason is FinishReason.CANCELLED:
        raise ShuttingDownError
    if read.token_ids != text or len(read.scores) != len(text):
        raise EngineFailedError(f"{len(read.scores)} of {len(text)} tokens were scored ({read.finish_reason})")
