"""The A/B: one prompt, a plain row and a row per steered arm, in one batch; then one held against the other."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence

from steer_server.engine.base import Engine
from steer_server.errors import InvalidRequestError
from steer_server.generate import CompletionBuilder
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
    Started,
)


async def compare(
    engine: Engine, registry: Registry, request: CompareRequest, *, max_arms: int
) -> AsyncGenerator[CompareEvent, None]:
    """Events of every arm as they come, the plain arm's under the name "normal"; at the end the comparisons.

    Raises any :class:`~steer_server.errors.SteerServerError`; closing the iterator early stops the work.
    """
    if len(request.arms) > max_arms:
        raise InvalidRequestError("arms", f"has {len(request.arms)} arms; at most {max_arms} are accepted")
    plans = [registry.plan(arm.operators, field=f"arms[{index}].operators") for index, arm in enumerate(request.arms)]
    ids = await engine.encode(request.prompt)
    names = (NORMAL, *(arm.name for arm in request.arms))
    # The plain row is scored too: its own log-probabilities give its perplexity.
    rows = (Row(None, score=request.score), *(Row(plan, score=request.score) for plan in plans))
    gatherers = [CompletionBuilder(request.request_id, len(ids), request.sampling, row.plan) for row in rows]
    done: dict[str, Completion] = {}
    stream = engine.submit(DecodeJob(ids, request.sampling, rows))
    try:
        for name in names:
            yield ArmEvent(name, Started(request.request_id, ids))
        async for event in stream:
            places = range(len(rows)) if isinstance(event, Admitted) else (event.row,)
            for place in places:
                for gathered in gatherers[place].add(event):
                    if isinstance(gathered, Completion):
                        done[names[place]] = gathered
                    yield ArmEvent(names[place], gathered)
        normal = done[NORMAL]
        yield Compared(tuple(compare_completions(normal, done[arm.name], arm.name) for arm in request.arms))
    finally:
        stream.cancel()


def compare_completions(normal: Completion, steered: Completion, arm: str) -> Comparison:
    """Where the two part, how far apart they are, and how likely the plain model finds each."""
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
    """Index of the first difference; the shorter length where one begins the other; None where they are equal."""
    if a == b:
        return None
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def perplexity(scores: Sequence[Score]) -> float | None:
    """exp of the mean negative log-probability under the plain model; None where nothing was scored."""
    if not scores:
        return None
    mean = math.fsum(score.plain_logprob for score in scores) / len(scores)
    # Beyond the range of a float it is called infinite: one text that the model finds impossible loses no comparison.
    return math.exp(-mean) if mean > -700.0 else math.inf
