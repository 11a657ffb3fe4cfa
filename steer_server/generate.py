"""One request: prompt to ids, operators to a plan, engine events to a stream of text and a completion."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

from steer_server.caps import NO_CAPS, Caps
from steer_server.engine.base import Engine
from steer_server.fed_positions import check_reachable, check_receipts
from steer_server.net_pushes import check_net_pushes
from steer_server.registry import Registry
from steer_server.types import (
    Admitted,
    Completion,
    DecodeJob,
    Delta,
    EngineEvent,
    GenerateEvent,
    GenerationRequest,
    ModelInfo,
    Row,
    RowFinished,
    SamplingParams,
    Score,
    Started,
    SteeringPlan,
    Timings,
    TokenEvent,
    TokenLogprob,
    Usage,
)


async def generate(
    engine: Engine,
    registry: Registry,
    request: GenerationRequest,
    *,
    caps: Caps = NO_CAPS,
) -> AsyncGenerator[GenerateEvent, None]:
    """Of each sample Started, then a delta per token, then the completion; those of several samples interleave.

    Raises any :class:`~steer_server.errors.SteerServerError`; closing the iterator early stops the work.
    """
    sampling = caps.apply(request.sampling)
    caps.check_samples(request.n)
    rows = caps.fit([Row(sampling=sampling.of_sample(number)) for number in range(request.n)])
    caps.reserve_tokens(rows)
    (plan,) = await registry.plan_beside({"operators": request.operators})
    ids = await engine.encode(request.prompt)
    job = engine.fit(DecodeJob(ids, tuple(replace(row, plan=plan) for row in rows), sampling.time_limit))
    max_tokens = job.rows[0].sampling.max_tokens
    check_plan(engine.model, plan, "operators", prompt_tokens=len(ids), max_tokens=max_tokens)
    builders = [
        CompletionBuilder(request.request_id, len(ids), row.sampling, plan, sample=number)
        for number, row in enumerate(job.rows)
    ]
    stream = engine.submit(job)
    try:
        for builder in builders:
            yield builder.started(ids)
        async for event in stream:
            for builder in builders if isinstance(event, Admitted) else (builders[event.row],):
                for result in builder.add(event):
                    yield result
    finally:
        stream.cancel()


def check_plan(model: ModelInfo, plan: SteeringPlan | None, field: str, *, prompt_tokens: int, max_tokens: int) -> None:
    """Raises :class:`InvalidRequestError` for operators that no text of a request can be steered with as asked.

    ``field``: of the operators.
    """
    limits = {
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "context_length": model.context_length,
    }
    check_reachable(plan, field, **limits)
    check_net_pushes(plan, field, **limits, dtype=model.dtype)


@dataclass
class CompletionBuilder:
    """Collects the events of one row into its completion."""

    request_id: str
    prompt_tokens: int
    sampling: SamplingParams
    plan: SteeringPlan | None
    began: float = field(default_factory=time.monotonic)
    """When the request entered the queue, in seconds of the monotonic clock."""
    _admitted: float | None = None
    _first_token: float | None = None
    _last_token: float | None = None
    _text: list[str] = field(default_factory=list)
    _ids: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _scores: list[Score] = field(default_factory=list)
    sample: int = 0

    def started(self, prompt_ids: tuple[int, ...]) -> Started:
        """The first event."""
        return Started(self.request_id, prompt_ids, () if self.plan is None else self.plan.digests, self.sample)

    def add(self, event: EngineEvent) -> tuple[Delta | Completion, ...]:
        """What the client gets at this event."""
        elapsed = event.at - self.began
        if isinstance(event, Admitted):
            self._admitted = elapsed
            return ()
        if isinstance(event, TokenEvent):
            return (self._token(event, elapsed),)
        return self._finish(event, elapsed)

    def _token(self, event: TokenEvent, elapsed: float) -> Delta:
        if self._first_token is None:
            self._first_token = elapsed
        since = None if self._last_token is None else elapsed - self._last_token
        self._last_token = elapsed
        self._text.append(event.text)
        self._ids.append(event.token_id)
        if event.logprob is not None:
            self._logprobs.append(event.logprob)
        if event.score is not None:
            self._scores.append(event.score)
        logprobs = () if event.logprob is None else (event.logprob,)
        return Delta(event.text, (event.token_id,), logprobs, since, self.sample)

    def _finish(self, event: RowFinished, elapsed: float) -> tuple[Delta | Completion, ...]:
        check_receipts(
            self.plan,
            event.receipts,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=len(self._ids),
            reason=event.reason,
        )
        self._text.append(event.text)
        self._scores.extend(event.scores)
        completion = Completion(
            request_id=self.request_id,
            text="".join(self._text),
            token_ids=tuple(self._ids),
            finish_reason=event.reason,
            stop_string=event.stop_string,
            usage=Usage(self.prompt_tokens, len(self._ids)),
            timings=Timings(
                elapsed if self._admitted is None else self._admitted, self._first_token, elapsed, self.began
            ),
            receipts=event.receipts,
            logprobs=tuple(self._logprobs),
            seed=self.sampling.seed,
            scores=tuple(self._scores),
            doses=event.doses,
            sample=self.sample,
        )
        rest = Delta(event.text, (), (), sample=self.sample)
        return (rest, completion) if event.text else (completion,)
