"""The A/B: of a prompt a plain row and a row per steered arm, decoded in one batch and then compared."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from operators.core.statistics import percentile, perplexity_of
from steer_server.caps import NO_CAPS, Caps
from steer_server.engine.base import Engine
from steer_server.errors import InvalidRequestError, errors_of
from steer_server.generate import CompletionBuilder, check_plan
from steer_server.job_run import JobRun, Submitted
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
    EngineEvent,
    NamedPrompt,
    Report,
    Row,
    RowFinished,
    SamplingParams,
    Score,
    SteeringPlan,
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

    Those of several prompts interleave. Raises any :class:`~steer_server.errors.SteerServerError`, for a prompt that is
    not accepted before the first event of any. Closing the iterator early stops the work.
    """
    check_size(request, max_arms)
    sampling = caps.apply(request.sampling)
    operators = {f"arms[{index}].operators": arm.operators for index, arm in enumerate(request.arms)}
    plans = await registry.plan_beside(operators)
    report = await work_out(request.report, engine.tokenizer)
    prompts = request.prompts or ((NamedPrompt("", request.prompt),) if request.prompt else ())
    texts = [
        _fitted(caps, tuple(_texts(request, _sampling_of(prompt, sampling), plans, report)), len(prompts))
        for prompt in prompts
    ]
    caps.reserve_tokens([text.row for text in texts[0]], num_prompts=len(prompts))
    if report is not None:
        tokens = sum(text.row.sampling.max_tokens for text in texts[0] if text.row.report is not None)
        check_figures(request.report, tokens, "report")
    jobs = []
    for index, prompt in enumerate(prompts):
        with _of_several(request, index):
            ids = await engine.encode(prompt.prompt)
            job = engine.fit(DecodeJob(ids, tuple(text.row for text in texts[index]), sampling.time_limit))
            lengths = {text.arm: row.sampling.max_tokens for text, row in zip(texts[index], job.rows, strict=True)}
            for field, plan, arm in zip(operators, plans, request.arms, strict=True):
                check_plan(engine.model, plan, field, prompt_tokens=len(ids), max_tokens=lengths[arm.name])
            engine.check(job)
            jobs.append(job)
    comparisons: dict[int, _Comparison] = {}
    run = JobRun(engine, jobs)
    try:
        async for event in run:
            if isinstance(event.event, Submitted):
                job = jobs[event.job]
                named, its = prompts[event.job].id, texts[event.job]
                comparisons[event.job] = _Comparison(request, named, its, job.prompt_ids, began=event.event.at)
                results = comparisons[event.job].started()
            else:
                results = comparisons[event.job].add(event.event)
            for result in results:
                if isinstance(result, Compared):
                    yield await comparisons.pop(event.job).reported(result, engine.tokenizer)
                else:
                    yield result
    finally:
        run.cancel()


@contextmanager
def _of_several(request: CompareRequest, index: int) -> Iterator[None]:
    """An error that is met with one of several prompts says with which."""
    try:
        with errors_of("prompt", at=f"prompts[{index}].prompt" if request.prompts else "prompt"):
            yield
    except InvalidRequestError as error:
        if request.prompts and not error.field.startswith("prompts"):
            error.move(error.field, note=f" (with prompts[{index}])")
        raise


class _Comparison:
    """Gathers the events of one prompt."""

    def __init__(
        self,
        request: CompareRequest,
        prompt_id: str,
        texts: Sequence[_Text],
        prompt_ids: tuple[int, ...],
        *,
        began: float,
    ) -> None:
        self._prompt_id, self._texts, self._prompt_ids = prompt_id, texts, prompt_ids
        self._builders = [
            CompletionBuilder(
                request.request_id,
                len(prompt_ids),
                text.row.sampling,
                text.row.plan,
                sample=text.sample,
                began=began,
            )
            for text in texts
        ]
        self._completions: dict[tuple[str, int], Completion] = {}
        self._report = request.report

    def started(self) -> Iterator[CompareEvent]:
        """The first event of each text."""
        for text, builder in zip(self._texts, self._builders, strict=True):
            yield ArmEvent(text.arm, builder.started(self._prompt_ids), self._prompt_id)

    def add(self, event: EngineEvent) -> Iterator[CompareEvent]:
        """What the client gets at this event: at the last one the comparisons too."""
        for place in range(len(self._texts)) if isinstance(event, Admitted) else (event.row,):
            arm = self._texts[place].arm
            for result in self._builders[place].add(event):
                if isinstance(result, Completion):
                    self._completions[arm, result.sample] = result
                yield ArmEvent(arm, result, self._prompt_id)
        if isinstance(event, RowFinished) and len(self._completions) == len(self._texts):
            yield self._compared()

    def _compared(self) -> Compared:
        ends = self._completions
        return Compared(
            tuple(
                compare_completions(ends.get((NORMAL, text.sample)), ends[text.arm, text.sample], text.arm)
                for text in self._texts
                if text.arm != NORMAL
            ),
            self._prompt_id,
        )

    async def reported(self, compared: Compared, tokenizer: Any) -> Compared:
        """The comparisons with what is to be said of every token."""
        if self._report is None:
            return compared
        texts = [self._completions[each.arm, each.sample] for each in compared.comparisons]
        known = await token_texts(texts, tokenizer)
        said = (token_comparisons(text, self._report, known) for text in texts)
        told = tuple(replace(each, tokens=tokens) for each, tokens in zip(compared.comparisons, said, strict=True))
        return replace(compared, comparisons=told)


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


def _sampling_of(prompt: NamedPrompt, sampling: SamplingParams) -> SamplingParams:
    return sampling if prompt.seed is None else replace(sampling, seed=prompt.seed)


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


def _fitted(caps: Caps, texts: Sequence[_Text], num_prompts: int) -> tuple[_Text, ...]:
    rows = caps.fit([text.row for text in texts], num_prompts=num_prompts)
    return tuple(replace(text, row=row) for text, row in zip(texts, rows, strict=True))


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
