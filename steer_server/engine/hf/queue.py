"""Jobs between the event loop and the decoding thread: those that wait, within bounds, and those that are decoded."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

from steer_server.config import MAX_RUNNING
from steer_server.engine.hf.memory import DecodeMemory
from steer_server.engine.receipts import empty_receipts
from steer_server.engine.waiting_room import WaitingRoom
from steer_server.errors import ShuttingDownError, SteerServerError
from steer_server.types import DecodeJob, EngineEvent, FinishReason, RowFinished

_PATIENCE = 30.0
"""Seconds after which a job that waits for memory is not passed by smaller ones any more."""
_Message = EngineEvent | SteerServerError | None
"""An event, the job's error, or None for the end."""


class QueuedJob:
    """One job: the event loop iterates over it, the decoding thread calls ``post`` and ``interruption``."""

    def __init__(self, job: DecodeJob, queue: JobQueue, need: int) -> None:
        """``need``: bytes that decoding it takes."""
        self.job, self.need, self.since = job, need, time.monotonic()
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._messages: asyncio.Queue[_Message] = asyncio.Queue()
        self._taken = asyncio.Event()
        self._cancelled = threading.Event()
        self._deadline = None if job.time_limit is None else time.monotonic() + job.time_limit

    async def __aiter__(self) -> AsyncIterator[EngineEvent]:
        """The events of the job; raises its error."""
        if await self._expires_waiting():
            for index, row in enumerate(self.job.rows):
                yield RowFinished(index, FinishReason.TIME_LIMIT, "", "", empty_receipts(row.plan))
            return
        while (message := await self._messages.get()) is not None:
            if isinstance(message, SteerServerError):
                raise message
            yield message

    async def _expires_waiting(self) -> bool:
        """Waits until the job is taken from the queue; true when its time limit ends first."""
        try:
            async with asyncio.timeout(None if self._deadline is None else self._deadline - time.monotonic()):
                await self._taken.wait()
        except TimeoutError:
            return self._queue.discard(self)
        return False

    def cancel(self) -> None:
        """Removes the job from the queue, or stops it at its next step."""
        self.stop()
        self._queue.discard(self)

    def stop(self) -> None:
        """Ends the job at its next step, as CANCELLED."""
        self._cancelled.set()

    def interruption(self) -> FinishReason | None:
        """CANCELLED or TIME_LIMIT when the job must end now, else None."""
        if self._cancelled.is_set():
            return FinishReason.CANCELLED
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return FinishReason.TIME_LIMIT
        return None

    def post(self, message: _Message) -> None:
        """Sends a message to the stream. Called by the decoding thread."""
        try:
            self._loop.call_soon_threadsafe(self._messages.put_nowait, message)
            self._loop.call_soon_threadsafe(self._taken.set)
        except RuntimeError:
            # The event loop is closed, and with it the stream.
            self._cancelled.set()


class JobQueue:
    """The jobs that wait, and those that are decoded at once: few enough for the memory, fair between clients."""

    def __init__(self, limit: int, *, max_running: int = MAX_RUNNING, memory: DecodeMemory | None = None) -> None:
        """``limit``: see :class:`WaitingRoom`. ``max_running``: a quarter of them, but one, may be one client's."""
        self._room = WaitingRoom(limit)
        self._max_running, self._memory = max_running, memory
        self._waiting: list[QueuedJob] = []
        self._running: list[QueuedJob] = []
        self._changed = threading.Condition()
        self._refusal: Callable[[], SteerServerError] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that are being decoded."""
        return len(self._running)

    def put(self, job: DecodeJob) -> QueuedJob:
        """Adds a job.

        Raises:
            InvalidRequestError: it does not fit into memory, were it alone.
            QueueFullError: there is no place to wait; with an estimate of when there is.
            ShuttingDownError: the queue is closed.
            EngineFailedError: the engine has failed.
        """
        need = self._memory.needed(job) if self._memory else 0
        queued = QueuedJob(job, self, need)
        with self._changed:
            if self._refusal is not None:
                raise self._refusal()
            self._room.enter(job.caller)
            self._waiting.append(queued)
            self._changed.notify()
        return queued

    def take(self, *, wait: bool) -> QueuedJob | None:
        """The next job that can begin, if there is one; ``wait`` until there is, or the queue is closed.

        Called by the decoding thread.
        """
        with self._changed:
            while (queued := self._next()) is None and wait and self._refusal is None:
                self._changed.wait()
            if queued is not None:
                self._leave(queued)
                self._running.append(queued)
            return queued

    def end(self, queued: QueuedJob, seconds: float) -> None:
        """A job has ended, for which the engine worked so long. Called by the decoding thread."""
        with self._changed:
            self._running.remove(queued)
            self._room.record(seconds)

    def discard(self, queued: QueuedJob) -> bool:
        """Removes a waiting job; false when it is not waiting any more."""
        with self._changed:
            is_waiting = queued in self._waiting
            if is_waiting:
                self._leave(queued)
            return is_waiting

    def close(self, refusal: Callable[[], SteerServerError] = ShuttingDownError) -> None:
        """Refuses the jobs that wait and those that come, and stops those that run."""
        with self._changed:
            self._refusal = self._refusal or refusal
            for queued in list(self._waiting):
                queued.post(self._refusal())
                self._leave(queued)
            for queued in self._running:
                queued.stop()
            self._changed.notify()

    def abandon(self, error: SteerServerError) -> None:
        """Ends the streams of the jobs that run: nothing more will come of them."""
        with self._changed:
            for queued in self._running:
                queued.post(error)

    def _leave(self, queued: QueuedJob) -> None:
        self._waiting.remove(queued)
        self._room.leave(queued.job.caller)

    def _next(self) -> QueuedJob | None:
        """The waiting job to begin now: of the host, and the connection, that has the fewest running."""
        if len(self._running) >= self._max_running:
            return None
        taken = sum(queued.need for queued in self._running)
        hosts = Counter(queued.job.caller.host for queued in self._running)
        clients = Counter(queued.job.caller.client for queued in self._running)
        each = max(1, self._max_running // 4)
        # The sort is stable: among equals first come, first served.
        for queued in sorted(
            self._waiting, key=lambda each: (hosts[each.job.caller.host], clients[each.job.caller.client])
        ):
            mine = clients[queued.job.caller.client]
            if mine >= each:
                continue
            if self._memory is None or self._memory.fits(queued.need, taken, has_others=mine > 0):
                return queued
            if time.monotonic() - queued.since > _PATIENCE:
                # Nobody passes any more, or it might wait for ever.
                return None
        return None
