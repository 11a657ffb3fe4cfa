"""One job on vLLM: a task per row, or one for a text that all rows read, and their events in one stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from operators.core.artifact import OperatorArtifact
from steer_server.caller import Caller
from steer_server.engine.outbox import Outbox
from steer_server.engine.receipts import empty_receipts
from steer_server.engine.vllm.decode_context import DecodeContext
from steer_server.engine.vllm.job_memory import JobMemory
from steer_server.engine.vllm.operator_room import NO_MEMORY
from steer_server.engine.vllm.row_decoder import RowDecoder
from steer_server.engine.vllm.text_reader import TextReader
from steer_server.errors import ShuttingDownError, SteerServerError
from steer_server.types import Admitted, DecodeJob, EngineEvent, FinishReason, RowFinished, TokenEvent


class VLLMJob:
    """Implements :class:`steer_server.engine.base.JobStream`.

    vLLM cannot hold up one request among others, so a reader that is far behind is given up after a while, and what
    vLLM decodes meanwhile waits for it.
    """

    def __init__(
        self,
        context: DecodeContext,
        job: DecodeJob,
        operators: Sequence[OperatorArtifact],
        memory: JobMemory = NO_MEMORY,
        *,
        on_end: Callable[[VLLMJob, float], None],
        on_leave: Callable[[VLLMJob], bool],
    ) -> None:
        """Decodes nothing before :meth:`begin`.

        Args:
            operators: those of all rows; from the beginning to ``on_end`` there is room for them.
            memory: what the job needs beside them.
            on_end: called once with the job and its duration in seconds, when its last row has ended.
            on_leave: called when nobody reads the job any more; whether it will not begin.
        """
        self.operators, self.memory, self.size = operators, memory, len(job.rows)
        self._context, self._job, self._on_end, self._on_leave = context, job, on_end, on_leave
        self._began = time.monotonic()
        loop, limit = asyncio.get_running_loop(), job.time_limit
        self._deadline = None if limit is None else loop.time() + limit
        self._expiry = None if self._deadline is None else loop.call_at(self._deadline, self._expire)
        self._outbox = Outbox(self._abort)
        self._admitted = False
        self._stopping = False
        self.running = 0
        self.waiting = self.size
        self._tasks: list[asyncio.Task[None]] = []
        self._num_unfinished = 0

    @property
    def caller(self) -> Caller:
        """For whom it is."""
        return self._job.caller

    def begin(self) -> None:
        """Hands the rows to vLLM."""
        self._began = time.monotonic()
        self._no_expiry()
        every = range(self.size)
        # A text that is given is read by all rows together, any other decoded by each alone.
        together = [every] if self._job.forced_ids else [(index,) for index in every]
        self._tasks = [asyncio.create_task(self._run(rows)) for rows in together]
        self._num_unfinished = len(self._tasks)
        for task in self._tasks:
            task.add_done_callback(self._row_done)

    async def __aiter__(self) -> AsyncIterator[EngineEvent]:
        """Events of all rows as they come; raises the job's first error."""
        unfinished = self.size
        while unfinished:
            message = await self._outbox.get()
            if isinstance(message, SteerServerError):
                self.cancel()
                raise message
            if message is not None:
                unfinished -= isinstance(message, RowFinished)
                yield message
        self.cancel()

    def cancel(self) -> None:
        """Aborts what is left of the job; nobody reads it."""
        self._outbox.close()
        self._no_expiry()
        if self._on_leave(self):
            self.waiting = 0
        self._abort()

    def stop(self) -> None:
        """Ends every row with the text it has, as CANCELLED."""
        self._stopping = True
        self._no_expiry()
        if self._on_leave(self):
            self.waiting = 0
            self._outbox.put(ShuttingDownError())
        self._abort()

    def _abort(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _expire(self) -> None:
        """The time limit ends while the job waits."""
        if self._on_leave(self):
            self.waiting = 0
            for index, row in enumerate(self._job.rows):
                self._outbox.put(RowFinished(index, FinishReason.TIME_LIMIT, "", "", empty_receipts(row.plan)))

    def _no_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()

    async def wait(self) -> None:
        """Returns when every row has ended."""
        await asyncio.wait(self._tasks)

    def _row_done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() and self._stopping:
            # A task that is cancelled before its first step posts nothing itself. A second error does no harm: the
            # reader stops at the first.
            self._outbox.put(ShuttingDownError())
        # Counted, not derived from the tasks: where several end in one turn of the loop, each of their callbacks would
        # find all of them done.
        self._num_unfinished -= 1
        if not self._num_unfinished:
            self._on_end(self, time.monotonic() - self._began)

    async def _run(self, rows: Sequence[int]) -> None:
        decoding = False

        def first_output(metrics: object) -> None:
            nonlocal decoding
            decoding = True
            self.waiting -= len(rows)
            self.running += len(rows)
            self._admit(metrics)

        common: dict[str, Any] = {"deadline": self._deadline, "emit": self._emit, "on_first_output": first_output}
        try:
            if self._job.forced_ids:
                await TextReader(self._context, self._job, **common).run()
            else:
                decoder = RowDecoder(self._context, self._job, rows[0], is_stopping=lambda: self._stopping, **common)
                self._outbox.put(await decoder.run())
        except SteerServerError as error:
            self._outbox.put(error)
        except asyncio.CancelledError:
            if self._stopping:
                # Cancelled where there is no text to end with: before decoding, or while measurements are collected.
                self._outbox.put(ShuttingDownError())
            raise
        except Exception as error:  # noqa: BLE001 - handed on
            # vLLM raises exceptions of any class. They go to the reader of the job instead of the event loop.
            self._outbox.put(self._context.translate_error(error))
        finally:
            if decoding:
                self.running -= len(rows)
            else:
                self.waiting -= len(rows)

    def _emit(self, event: EngineEvent) -> None:
        if isinstance(event, TokenEvent) and not self._job.forced_ids:
            is_steered = self._job.rows[event.row].plan is not None
            self._context.work.add(0, not is_steered, is_steered)
            self._job.caller.grant.charge.use(1)
        self._outbox.put(event)

    def _admit(self, metrics: object) -> None:
        """Posts, once per job, when vLLM scheduled the first of its rows."""
        if self._admitted:
            return
        self._admitted = True
        self._job.caller.grant.charge.use(len(self._job.forced_ids) * self.size)
        # The last token of a text is never fed.
        self._context.work.add(len(self._job.prompt_ids) + max(0, len(self._job.forced_ids) - 1), 0, 0)
        # The engine core runs on this machine, on the same monotonic clock. Where vLLM keeps no statistics, the time of
        # the first token stands in.
        scheduled = getattr(metrics, "scheduled_ts", 0.0)
        self._outbox.put(Admitted(at=scheduled) if scheduled else Admitted())
