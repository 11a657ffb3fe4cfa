"""A given text, read by every row of a job on vLLM: one request per row, whose hidden states are then scored."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from steer_server.engine.distributions import NO_REPORT
from steer_server.engine.dose import check_strengths
from steer_server.engine.proof import Proof
from steer_server.engine.receipts import empty_receipts
from steer_server.engine.vllm.decode_context import READING, DecodeContext, prove_receipts
from steer_server.engine.vllm.measurements import generated_doses
from steer_server.engine.vllm.worker_protocol import OperatorSetting, operator_settings
from steer_server.types import DecodeJob, EngineEvent, FinishReason, RowFinished, SteeringPlan, TokenEvent


@dataclass(eq=False)
class _Reading:
    """One request to vLLM: the plain one, or that of a row."""

    settings: tuple[OperatorSetting, ...] = ()
    proof: Proof | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    is_held: bool = False
    """Whether the workers hold something for it that nobody has collected."""


class TextReader:
    """Reads the text of a job, once."""

    def __init__(
        self,
        context: DecodeContext,
        job: DecodeJob,
        *,
        deadline: float | None,
        emit: Callable[[EngineEvent], None],
        on_first_output: Callable[[Any], None],
    ) -> None:
        """As of :class:`.RowDecoder`. Nothing runs before :meth:`run`."""
        self._context, self._job, self._deadline = context, job, deadline
        self._emit, self._on_first_output, self._begun = emit, on_first_output, False
        self._plain = _Reading()

    async def run(self) -> None:
        """Emits the tokens of every row with their scores, and its end.

        Raises:
            SteeringNotAppliedError: a plan was not applied at all of its positions.
            Exception: whatever vLLM raises.
        """
        rows, text = self._job.rows, self._job.forced_ids
        readings = [self._reading(row.plan) for row in rows]
        distinct = list({id(reading): reading for reading in (self._plain, *readings)}.values())
        score = self._context.client.score
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._read_all(distinct)
                scores = [
                    await score(reading.key, self._plain.key, text, row.report or NO_REPORT)
                    for row, reading in zip(rows, readings, strict=True)
                ]
            # All of them before the first event: half a text has no score.
            ends = [await self._end(index, reading) for index, reading in enumerate(readings)]
        except TimeoutError:
            for index, row in enumerate(rows):
                self._emit(RowFinished(index, FinishReason.TIME_LIMIT, "", "", empty_receipts(row.plan)))
            return
        finally:
            for reading in distinct:
                if reading.is_held:
                    # Taking its measurement makes the workers forget it.
                    self._context.measurements.collect(reading.key, reading.settings)
        for end, row_scores in zip(ends, scores, strict=True):
            for token, each in zip(text, row_scores, strict=True):
                self._emit(TokenEvent(end.row, token, "", score=each))
            self._emit(end)

    def _reading(self, plan: SteeringPlan | None) -> _Reading:
        """That of a row. One whose operators all have strength 0 is the plain one."""
        prompt = self._job.prompt_ids
        settings = () if plan is None else operator_settings(plan, len(prompt))
        if plan is None or not settings:
            return self._plain
        check_strengths(plan, self._context.dtype)
        max_tokens = len(self._job.forced_ids)
        return _Reading(settings, Proof(plan, self._context.embed, prompt_ids=prompt, max_tokens=max_tokens))

    async def _read_all(self, readings: Sequence[_Reading]) -> None:
        await self._context.operator_cache.load(
            use.artifact
            for row in self._job.rows
            for use in (row.plan.applications if row.plan else ())
            if use.setting.strength
        )
        tasks = [asyncio.ensure_future(self._read(reading)) for reading in readings]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _read(self, reading: _Reading) -> None:
        prompt, text = self._job.prompt_ids, self._job.forced_ids
        # The text's first token is foretold by the state of the prompt's last one, and after its last there is none.
        # Nothing is taken from the cache: a state that is not computed cannot be kept.
        stream = self._context.client.generate(
            (*prompt, *text[:-1]),
            READING,
            reading.settings,
            reading.key,
            keep_from=len(prompt) - 1,
            private_cache=True,
            looks_at={} if reading.proof is None else reading.proof.positions,
        )
        reading.is_held = True
        try:
            async for output in stream:
                if not self._begun:
                    self._begun = True
                    self._on_first_output(output.metrics)
        finally:
            await stream.aclose()

    async def _end(self, index: int, reading: _Reading) -> RowFinished:
        """The end of a row, with what was measured of it."""
        row, prompt = self._job.rows[index], self._job.prompt_ids
        plan, receipts, doses = row.plan, empty_receipts(row.plan), tuple[float, ...]()
        if plan is not None and reading.proof is not None:
            reading.is_held = False
            collect, ids = self._context.measurements.collect, (*prompt, *self._job.forced_ids)
            measurement = await asyncio.shield(collect(reading.key, reading.settings, begun=True))
            receipts = await prove_receipts(
                self._context, plan, reading.proof, measurement, ids=ids, prompt_tokens=len(prompt)
            )
            if row.report is not None and row.report.doses:
                doses = generated_doses(plan, measurement, prompt_tokens=len(prompt), fed=len(ids) - 1)
        return RowFinished(index, FinishReason.MAX_TOKENS, "", "", receipts, doses=doses)
