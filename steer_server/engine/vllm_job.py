"""One job on vLLM: a task per row, their events in one stream."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from steer_server.engine.accounts import receipts
from steer_server.engine.batch import uses_of
from steer_server.engine.kl import kl_lower_bound
from steer_server.engine.rows import RowText
from steer_server.engine.steering import check_strengths, untouched_receipts
from steer_server.engine.text import Detokenizer
from steer_server.errors import EngineFailedError, SteerServerError
from steer_server.types import (
    Admitted,
    DecodeJob,
    EngineEvent,
    FinishReason,
    Receipt,
    Row,
    RowFinished,
    SamplingParams,
    Score,
    TokenEvent,
    TokenLogprob,
    TopLogprob,
)

if TYPE_CHECKING:
    from steer_server.engine.vllm import VLLMEngine


class VLLMJob:
    """Implements :class:`steer_server.engine.base.JobStream`."""

    def __init__(self, engine: VLLMEngine, tokenizer: Any, job: DecodeJob) -> None:
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

    def _done(self, _task: asyncio.Task[None]) -> None:
        if all(task.done() for task in self._tasks):
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
        except EngineDeadError as error:
            self._messages.put_nowait(EngineFailedError(f"the engine died: {error}"))
        except EngineGenerateError as error:
            self._messages.put_nowait(EngineFailedError(f"{type(error.__cause__).__name__}: {error.__cause__}"))
        except ValueError as error:
            # What vLLM refuses of a request that this server accepted.
            self._messages.put_nowait(EngineFailedError(f"vLLM refuses the request: {error}"))
        finally:
            if decoding:
                self.running -= 1
            else:
                self.waiting -= 1

    async def _decode(self, index: int, row: Row, begins: Any) -> RowFinished:
        engine, job = self._engine, self._job
        artifacts = []
        if row.plan is not None:
            check_strengths(row.plan, engine.dtype)
            artifacts = [use.artifact for use in row.plan.applications if use.setting.strength]
            await engine.shelf.hold(artifacts)
        text = RowText(
            Detokenizer(self._tokenizer, job.prompt_ids),
            job.sampling,
            prompt_tokens=len(job.prompt_ids),
            context_length=engine.model.context_length,
            eos_ids=frozenset(engine.model.eos_token_ids),
        )
        key, steered = uuid.uuid4().hex, row.plan is not None and bool(uses_of(row.plan))
        owed = False
        try:
            stream = engine.generate(job.prompt_ids, self._params(row), row.plan, key)
            owed = steered
            reason, stop_string, alternatives = await self._read(index, row, stream, text, begins)
            found: tuple[Receipt, ...] = untouched_receipts(row.plan)
            if steered and text.ids and row.plan is not None:
                fed = len(job.prompt_ids) + len(text.ids) - 1
                account = await engine.desk.take(key)
                owed = False
                found = receipts(row.plan, account, prompt_tokens=len(job.prompt_ids), fed=fed)
            scores = await self._scores(row, text.ids, alternatives) if row.score and not self._stopping else ()
            return RowFinished(index, reason, "" if stop_string else text.flush(), stop_string, found, scores)
        finally:
            engine.shelf.release(artifact.digest for artifact in artifacts)
            if owed:
                # Nobody will ask for it: the workers are to forget it all the same.
                engine.later(engine.desk.take(key))

    async def _read(
        self, index: int, row: Row, stream: Any, text: RowText, begins: Any
    ) -> tuple[FinishReason, str, list[Mapping[int, float]]]:
        """Posts the tokens; why the text ended, by which stop string, and each token's alternatives if it is scored."""
        alternatives: list[Mapping[int, float]] = []
        try:
            async with asyncio.timeout_at(self._deadline):
                async for output in stream:
                    begins(output.metrics)
                    choice = output.outputs[0]
                    for place, token in enumerate(choice.token_ids):
                        logprobs = choice.logprobs[place] if choice.logprobs else None
                        if row.score:
                            alternatives.append(_logprobs(logprobs))
                        piece, reason = text.push(token)
                        told = self._logprob(token, logprobs) if self._job.sampling.logprobs is not None else None
                        self._messages.put_nowait(TokenEvent(index, token, piece.text, told))
                        if reason is not None:
                            return reason, piece.stop_string, alternatives
                    if output.finished:
                        raise EngineFailedError(f"vLLM ended a text without a reason of ours: {choice.finish_reason}")
        except TimeoutError:
            return FinishReason.TIME_LIMIT, "", alternatives
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._stopping or task is None:
                raise
            task.uncancel()
            return FinishReason.CANCELLED, "", alternatives
        finally:
            await stream.aclose()
        raise EngineFailedError("vLLM ended a text without a last token")

    def _params(self, row: Row) -> dict[str, Any]:
        sampling = self._job.sampling
        room = self._engine.model.context_length - len(self._job.prompt_ids)
        wanted = [] if sampling.logprobs is None else [sampling.logprobs]
        if row.score:
            # A plain row is its own plain model: the chosen token is enough.
            wanted.append(self._engine.score_logprobs if row.plan else 0)
        return {
            **_sampling(sampling),
            "max_tokens": min(sampling.max_tokens, room),
            "logprobs": max(wanted, default=None),
        }

    async def _scores(self, row: Row, ids: list[int], own: list[Mapping[int, float]]) -> tuple[Score, ...]:
        """Each token of a finished text under the plain model; KL from the most likely tokens of both."""
        if row.plan is None:
            return tuple(Score(0.0, alternatives[token]) for token, alternatives in zip(ids, own, strict=True))
        if not ids:
            return ()
        prompt = self._job.prompt_ids
        count = self._engine.score_logprobs
        params = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True}
        # The last token is fed only where there is room for one more.
        fits = len(prompt) + len(ids) < self._engine.model.context_length
        read = ids if fits else ids[:-1]
        plain: list[Mapping[int, float]] = []
        async for output in self._engine.generate(
            (*prompt, *read), {**params, "prompt_logprobs": count, "logprobs": count}, None, uuid.uuid4().hex
        ):
            if output.prompt_logprobs:
                plain = [_logprobs(found) for found in output.prompt_logprobs[len(prompt) :]]
        return tuple(
            Score(kl_lower_bound(p, q), p[token], exact=False) for token, p, q in zip(read, plain, own, strict=False)
        )

    def _logprob(self, token: int, found: Any) -> TokenLogprob:
        count = self._job.sampling.logprobs or 0
        ranked = sorted(found.items(), key=lambda item: -item[1].logprob)[:count]
        top = tuple(TopLogprob(other, self._text(other), value.logprob) for other, value in ranked)
        return TokenLogprob(token, self._text(token), found[token].logprob, top)

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


def _logprobs(found: Any) -> dict[int, float]:
    return {token: value.logprob for token, value in found.items()}


def _sampling(sampling: SamplingParams) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": sampling.seed,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
    }
