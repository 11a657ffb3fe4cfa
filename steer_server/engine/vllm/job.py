"""One job on vLLM: a task per row, their events in one stream."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from steer_server.engine.dose import check_strengths
from steer_server.engine.receipts import untouched_receipts
from steer_server.engine.row_text import RowText
from steer_server.engine.text import Detokenizer
from steer_server.engine.vllm.measurements import receipts
from steer_server.engine.vllm.sampling import vllm_sampling
from steer_server.engine.vllm.step_steering import Use, uses_of
from steer_server.errors import EngineFailedError, ShuttingDownError, SteeringNotAppliedError, SteerServerError
from steer_server.types import (
    Admitted,
    DecodeJob,
    EngineEvent,
    FinishReason,
    Receipt,
    Row,
    RowFinished,
    Score,
    SteeringPlan,
    TokenEvent,
    TokenLogprob,
    TopLogprob,
)

if TYPE_CHECKING:
    from operators.core.artifact import OperatorArtifact
    from steer_server.engine.vllm.engine import VLLMEngine


class VLLMJob:
    """Implements :class:`steer_server.engine.base.JobStream`."""

    def __init__(
        self, engine: VLLMEngine, tokenizer: Any, job: DecodeJob, operators: Sequence[OperatorArtifact]
    ) -> None:
        """``operators``: those of all rows, with room reserved until the engine is told of the job's end."""
        self.operators = operators
        self._engine, self._tokenizer, self._job = engine, tokenizer, job
        self._began = time.monotonic()
        limit = job.sampling.time_limit
        self._deadline = None if limit is None else asyncio.get_running_loop().time() + limit
        self._messages: asyncio.Queue[EngineEvent | SteerServerError] = asyncio.Queue()
        self._admitted = False
        self._stopping = False
        self.running = 0
        self.waiting = len(job.rows)
        self._tasks = [asyncio.create_task(self._row(index, row)) for index, row in enumerate(job.rows)]
        self._left = len(self._tasks)
        for task in self._tasks:
            task.add_done_callback(self._done)

    async def __aiter__(self) -> AsyncIterator[EngineEvent]:
        """Events of all rows as they come; raises the job's first error."""
        left = len(self._tasks)
        while left:
            message = await self._messages.get()
            if isinstance(message, SteerServerError):
                raise message
            left -= isinstance(message, RowFinished)
            yield message

    def cancel(self) -> None:
        """Aborts what is left of the job."""
        for task in self._tasks:
            task.cancel()

    def stop(self) -> None:
        """Ends every row with the text it has, as CANCELLED."""
        self._stopping = True
        self.cancel()

    async def wait(self) -> None:
        """Returns when every row is over."""
        await asyncio.wait(self._tasks)

    def _done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() and self._stopping:
            # One that was cancelled before it began said nothing; said twice, it does no harm.
            self._messages.put_nowait(ShuttingDownError())
        # Counted: of tasks that end in one turn of the loop, every callback finds all of them done.
        self._left -= 1
        if not self._left:
            self._engine.ended(self, time.monotonic() - self._began)

    async def _row(self, index: int, row: Row) -> None:
        decoding = False

        def begins(metrics: Any) -> None:
            nonlocal decoding
            if decoding:
                return
            decoding = True
            self.waiting -= 1
            self.running += 1
            if not self._admitted:
                self._admitted = True
                # The engine's clock is this machine's; without its statistics the first token's time stands for it.
                scheduled = getattr(metrics, "scheduled_ts", 0.0)
                self._messages.put_nowait(Admitted(at=scheduled) if scheduled else Admitted())

        try:
            self._messages.put_nowait(await self._decode(index, row, begins))
        except SteerServerError as error:
            self._messages.put_nowait(error)
        except asyncio.CancelledError:
            if self._stopping:
                # Between two waits for the engine there is no text to end with.
                self._messages.put_nowait(ShuttingDownError())
            raise
        except Exception as error:  # noqa: BLE001 - handed on
            # One row's failure is its own, and whoever reads it learns of it: vLLM's calls raise what they like.
            self._messages.put_nowait(self._engine.failure(error))
        finally:
            if decoding:
                self.running -= 1
            else:
                self.waiting -= 1

    async def _decode(self, index: int, row: Row, begins: Any) -> RowFinished:
        engine, job = self._engine, self._job
        if row.plan is not None:
            check_strengths(row.plan, engine.dtype)
            try:
                async with asyncio.timeout_at(self._deadline):
                    await engine.shelf.load(use.artifact for use in row.plan.applications if use.setting.strength)
            except TimeoutError:
                return RowFinished(index, FinishReason.TIME_LIMIT, "", "", untouched_receipts(row.plan))
        text = RowText(
            Detokenizer(self._tokenizer, job.prompt_ids),
            job.sampling,
            prompt_tokens=len(job.prompt_ids),
            context_length=engine.model.context_length,
            eos_ids=frozenset(engine.model.eos_token_ids),
        )
        uses = () if row.plan is None else uses_of(row.plan)
        prompt, key = job.prompt_ids, uuid.uuid4().hex
        # What a score is made of: the states that the text's tokens are chosen from.
        keep = len(prompt) - 1 if row.score and row.plan is not None else None
        owed = False
        try:
            stream = engine.generate(prompt, self._params(row), uses, key, keep=keep)
            owed = bool(uses) or keep is not None
            reason, stop_string, own = await self._read(index, stream, text, begins)
            scores = await self._scores(row, key, text.ids, own) if row.score and not self._stopping else ()
            found: tuple[Receipt, ...] = untouched_receipts(row.plan)
            if uses and text.ids and row.plan is not None:
                owed = False
                account = await asyncio.shield(engine.desk.settle(key, uses, begun=True))
                found = self._receipts(row.plan, uses, account, fed=len(prompt) + len(text.ids) - 1)
            return RowFinished(index, reason, "" if stop_string else text.flush(), stop_string, found, scores)
        finally:
            if owed:
                # Nobody waits for its account: the workers are to forget it all the same.
                engine.desk.settle(key, uses, begun=bool(text.ids))

    def _receipts(self, plan: SteeringPlan, uses: Sequence[Use], account: Any, *, fed: int) -> tuple[Receipt, ...]:
        try:
            return receipts(plan, account, prompt_tokens=len(self._job.prompt_ids), fed=fed)
        except SteeringNotAppliedError:
            # Also where the workers know of no failure: what is in the cache is not what its salt says.
            self._engine.salts.renew(uses)
            raise

    async def _read(self, index: int, stream: Any, text: RowText, begins: Any) -> tuple[FinishReason, str, list[float]]:
        """Posts the tokens; why the text ended, by which stop string, and each token's own log-probability if asked."""
        own: list[float] = []
        try:
            async with asyncio.timeout_at(self._deadline):
                async for output in stream:
                    begins(output.metrics)
                    choice = output.outputs[0]
                    for place, token in enumerate(choice.token_ids):
                        logprobs = choice.logprobs[place] if choice.logprobs else None
                        if logprobs is not None:
                            own.append(logprobs[token].logprob)
                        piece, reason = text.push(token)
                        told = self._logprob(token, logprobs) if self._job.sampling.logprobs is not None else None
                        self._messages.put_nowait(TokenEvent(index, token, piece.text, told))
                        if reason is not None:
                            return reason, piece.stop_string, own
                    if output.finished:
                        raise EngineFailedError(f"vLLM ended a text without a reason of ours: {choice.finish_reason}")
        except TimeoutError:
            return FinishReason.TIME_LIMIT, "", own
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._stopping or task is None:
                raise
            task.uncancel()
            return FinishReason.CANCELLED, "", own
        finally:
            await stream.aclose()
        raise EngineFailedError("vLLM ended a text without a last token")

    def _params(self, row: Row) -> dict[str, Any]:
        sampling = self._job.sampling
        room = self._engine.model.context_length - len(self._job.prompt_ids)
        # A plain row is its own plain model: its tokens' log-probabilities are its score.
        logprobs = 0 if sampling.logprobs is None and row.score and row.plan is None else sampling.logprobs
        return {**vllm_sampling(sampling), "max_tokens": min(sampling.max_tokens, room), "logprobs": logprobs}

    async def _scores(self, row: Row, key: str, ids: list[int], own: list[float]) -> tuple[Score, ...]:
        """Each token of a finished text under the plain model: one more row reads the text without steering.

        Without scores where the time limit runs out: the text is as whole as it was, and ended by its own reason.
        """
        if row.plan is None or not ids:
            return tuple(Score(0.0, logprob) for logprob in own)
        if self._deadline is not None and self._deadline <= asyncio.get_running_loop().time():
            return ()
        engine, prompt, plain = self._engine, self._job.prompt_ids, uuid.uuid4().hex
        params = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True}
        # The last token is not fed: nothing is chosen after it.
        stream = engine.generate((*prompt, *ids[:-1]), params, (), plain, keep=len(prompt) - 1, alone=True)
        try:
            async with asyncio.timeout_at(self._deadline):
                async for _ in stream:
                    pass
                found = await engine.score(key, plain, ids)
        except TimeoutError:
            return ()
        finally:
            await stream.aclose()
            engine.desk.settle(plain, ())
        return tuple(Score(kl, logprob) for kl, logprob in zip(found["kl"], found["logprobs"], strict=True))

    def _logprob(self, token: int, found: Any) -> TokenLogprob:
        count = self._job.sampling.logprobs or 0
        ranked = sorted(found.items(), key=lambda item: -item[1].logprob)[:count]
        top = tuple(TopLogprob(other, self._text(other), value.logprob) for other, value in ranked)
        return TokenLogprob(token, self._text(token), found[token].logprob, top)

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))
