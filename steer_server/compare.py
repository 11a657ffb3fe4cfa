"""The A/B: one prompt, a plain row and a row per steered arm, decoded in one batch and then compared."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence

from operators.core.statistics import percentile
from steer_server.caps import NO_CAPS, Caps
from steer_server.engine.base import Engine
from steer_server.errors import InvalidRequestError
from steer_server.generate import CompletionBuilder, check_plan
from steer_server.registry import Registry
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
    Row,
    Score,
)


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
    if len(request.arms) > max_arms:
        raise InvalidRequestError("arms", f"has {len(request.arms)} arms; at most {max_arms} are accepted")
    sampling = caps.apply(request.sampling, num_texts=1 + len(request.arms))
    operators = {f"arms[{index}].operators": arm.operators for index, arm in enumerate(request.arms)}
    plans = await registry.plan_beside(operators)
    ids = await engine.encode(request.prompt)
    for field, plan in zip(operators, plans, strict=True):
        check_plan(engine.model, plan, field, prompt_tokens=len(ids), max_tokens=sampling.max_tokens)
    names = (NORMAL, *(arm.name for arm in request.arms))
    # Scoring the plain row gives its own log-probabilities, and so its perplexity.
    rows = (Row(None, score=request.score), *(Row(plan, score=request.score) for plan in plans))
    builders = [CompletionBuilder(request.request_id, len(ids), sampling, row.plan) for row in rows]
    completions: dict[str, Completion] = {}
    stream = engine.submit(DecodeJob(ids, sampling, rows))
    try:
        for name, builder in zip(names, builders, strict=True):
            yield ArmEvent(name, builder.started(ids))
        async for event in stream:
            places = range(len(rows)) if isinstance(event, Admitted) else (event.row,)
            for place in places:
                for result in builders[place].add(event):
                    if isinstance(result, Completion):
                        completions[names[place]] = result
                    yield ArmEvent(names[place], result)
        normal = completions[NORMAL]
        yield Compared(tuple(compare_completions(normal, completions[arm.name], arm.name) for arm in request.arms))
    finally:
        stream.cancel()


def compare_completions(normal: Completion, steered: Completion, arm: str) -> Comparison:
    """Where two texts diverge, KL(plain || steered) per token in nats, and their perplexities under the plain model."""
    kl = tuple(score.kl for score in steered.scores)
    return Comparison(
        arm=arm,
        first_divergence=first_divergence(normal.token_ids, steered.token_ids),
        kl_per_token=kl,
        kl_mean=math.fsum(kl) / len(kl) if kl else None,
        kl_p95=percentile(kl, 0.95) if kl else None,
        normal_perplexity=perplexity(normal.scores),
        steered_perplexity=perplexity(steered.scores),
    )


def first_divergence(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs: the shorter length where one begins the other; None where a equals b."""
    if a == b:
        return None
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def perplexity(scores: Sequence[Score]) -> float | None:
    """exp(-mean log p) under the plain model; None where nothing was scored."""
    if not scores:
        return None
    mean = math.fsum(score.plain_logprob for score in scores) / len(scores)
    # Infinite beyond the range of a float, where exp would raise.
    return math.exp(-mean) if mean > -700.0 else math.inf
