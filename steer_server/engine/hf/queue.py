"""A bounded queue of jobs between the event loop and the decoding thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator

from steer_server.engine.receipts import empty_receipts
from steer_server.errors import QueueFullError, ShuttingDownError, SteerServerError
from steer_server.types import DecodeJob, EngineEvent, FinishReason, RowFinished

_Message = EngineEvent | SteerServerError | None
"""An event, the job's error, or None for the end."""


class QueuedJob:
    """One job: the event loop iterates over it, the decoding thread calls ``post`` and ``interruption``."""

    def __init__(self, job: DecodeJob, queue: JobQueue) -> None:
        self.job = job
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._messages: asyncio.Queue[_Message] = asyncio.Queue()
        self._taken = asyncio.Event()
        self._cancelled = threading.Event()
        limit = job.sampling.time_limit
        self._deadline = None if limit is None else time.monotonic() + limit

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
    """First in, first out; at most ``limit`` jobs wait."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[QueuedJob] = deque()
        self._changed = threading.Condition()
        self._running: QueuedJob | None = None
        self._closed = False
        self._seconds_per_job = 1.0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        """1 while a job is being decoded."""
        return int(self._running is not None)

    def put(self, job: DecodeJob) -> QueuedJob:
        """Adds a job.

        Raises:
            QueueFullError: ``limit`` jobs wait; with an estimate of when there is room.
            ShuttingDownError: the queue is closed.
        """
        queued = QueuedJob(job, self)
        with self._changed:
            if self._closed:
                raise ShuttingDownError
            if len(self._waiting) >= self._limit:
                problem = f"{self._limit} requests wait already, the most admitted"
                raise QueueFullError(problem, retry_after=max(1.0, self._seconds_per_job))
            self._waiting.append(queued)
            self._changed.notify()
        return queued

    def take(self) -> QueuedJob | None:
        """Waits for the next job; None once the queue is closed. Called by the decoding thread."""
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def record_duration(self, seconds: float) -> None:
        """Updates the moving average of a job's duration, which ``retry_after`` is estimated from."""
        self._seconds_per_job += 0.2 * (seconds - self._seconds_per_job)

    def discard(self, queued: QueuedJob) -> bool:
        """Removes a waiting job; false when it is not waiting any more."""
        with self._changed:
            is_waiting = queued in self._waiting
            if is_waiting:
                self._waiting.remove(queued)
            return is_waiting

    def close(self) -> None:
        """Refuses the waiting jobs and stops the running one."""
        with self._changed:
            self._closed = True
            for queued in self._waiting:
                queued.post(ShuttingDownError())
            self._waiting.clear()
            if self._running is not None:
                self._running.stop()
            self._changed.notify()
