"""One job on vLLM: a task per row, their events in one stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from operators.core.artifact import OperatorArtifact
from steer_server.engine.vllm.row_decoder import DecodeContext, RowDecoder
from steer_server.errors import ShuttingDownError, SteerServerError
from steer_server.types import Admitted, DecodeJob, EngineEvent, RowFinished, TokenEvent


class VLLMJob:
    """Implements :class:`steer_server.engine.base.JobStream`."""

    def __init__(
        self,
        context: DecodeContext,
        job: DecodeJob,
        operators: Sequence[OperatorArtifact],
        on_end: Callable[[VLLMJob, float], None],
    ) -> None:
        """Starts decoding.

        Args:
            operators: those of all rows; the caller has reserved room for them until ``on_end``.
            on_end: called once with the job and its duration in seconds, when its last row has ended.
        """
        self.operators = operators
        self._context, self._job, self._on_end = context, job, on_end
        self._began = time.monotonic()
        limit = job.time_limit
        self._deadline = None if limit is None else asyncio.get_running_loop().time() + limit
        self._messages: asyncio.Queue[EngineEvent | SteerServerError] = asyncio.Queue()
        self._admitted = False
        self._stopping = False
        self.running = 0
        self.waiting = len(job.rows)
        self._tasks = [asyncio.create_task(self._run_row(index)) for index in range(len(job.rows))]
        self._num_unfinished = len(self._tasks)
        for task in self._tasks:
            task.add_done_callback(self._row_done)

    async def __aiter__(self) -> AsyncIterator[EngineEvent]:
        """Events of all rows as they come; raises the job's first error."""
        unfinished = len(self._tasks)
        while unfinished:
            message = await self._messages.get()
            if isinstance(message, SteerServerError):
                raise message
            unfinished -= isinstance(message, RowFinished)
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
        """Returns when every row has ended."""
        await asyncio.wait(self._tasks)

    def _row_done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() and self._stopping:
            # A task that is cancelled before its first step posts nothing itself. A second error does no harm: the
            # reader stops at the first.
            self._messages.put_nowait(ShuttingDownError())
        # Counted, not derived from the tasks: where several end in one turn of the loop, each of their callbacks would
        # find all of them done.
        self._num_unfinished -= 1
        if not self._num_unfinished:
            self._on_end(self, time.monotonic() - self._began)

    async def _run_row(self, index: int) -> None:
        decoding = False

        def first_output(metrics: object) -> None:
            nonlocal decoding
            decoding = True
            self.waiting -= 1
            self.running += 1
            self._admit(metrics)

        decoder = RowDecoder(
            self._context,
            self._job,
            index,
            deadline=self._deadline,
            emit=self._emit,
            on_first_output=first_output,
            is_stopping=lambda: self._stopping,
        )
        try:
            self._messages.put_nowait(await decoder.run())
        except SteerServerError as error:
            self._messages.put_nowait(error)
        except asyncio.CancelledError:
            if self._stopping:
                # Cancelled where there is no text to end with: before decoding, or while measurements are collected.
                self._messages.put_nowait(ShuttingDownError())
            raise
        except Exception as error:  # noqa: BLE001 - handed on
            # vLLM raises exceptions of any class. They go to the reader of the job instead of the event loop.
            self._messages.put_nowait(self._context.translate_error(error))
        finally:
            if decoding:
                self.running -= 1
            else:
                self.waiting -= 1

    def _emit(self, event: EngineEvent) -> None:
        if isinstance(event, TokenEvent):
            is_steered = self._job.rows[event.row].plan is not None
            self._context.work.add(0, not is_steered, is_steered)
        self._messages.put_nowait(event)

    def _admit(self, metrics: object) -> None:
        """Posts, once per job, when vLLM scheduled the first of its rows."""
        if self._admitted:
            return
        self._admitted = True
        self._context.work.add(len(self._job.prompt_ids), 0, 0)
        # The engine core runs on this machine, on the same monotonic clock. Where vLLM keeps no statistics, the time of
        # the first token stands in.
        scheduled = getattr(metrics, "scheduled_ts", 0.0)
        self._messages.put_nowait(Admitted(at=scheduled) if scheduled else Admitted())
