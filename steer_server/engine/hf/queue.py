"""Jobs between the event loop and the decoding thread: those that wait, within bounds, and those that are decoded."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

from steer_server.caller import Caller
from steer_server.config import MAX_RUNNING
from steer_server.engine.fair_queue import FairQueue
from steer_server.engine.hf.decode_room import DecodeRoom
from steer_server.engine.hf.memory import DecodeMemory
from steer_server.engine.outbox import Message, Outbox
from steer_server.engine.receipts import empty_receipts
from steer_server.errors import ShuttingDownError, SteerServerError
from steer_server.types import DecodeJob, EngineEvent, FinishReason, RowFinished

_POLL_SECONDS = 0.1
"""How often the time limits of jobs are looked at whose readers are far behind, while no other job is decoded."""


class QueuedJob:
    """One job: the event loop iterates over it, the decoding thread calls ``post`` and ``interruption``."""

    size = 1
    """Among the running ones of its client: its rows share every turn."""

    def __init__(self, job: DecodeJob, queue: JobQueue, need: int) -> None:
        """``need``: bytes that decoding it takes."""
        self.job, self.need = job, need
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(self.stop, queue.wake)
        self._taken = asyncio.Event()
        self._cancelled = threading.Event()
        self._deadline = None if job.time_limit is None else time.monotonic() + job.time_limit

    @property
    def caller(self) -> Caller:
        """For whom it is."""
        return self.job.caller

    @property
    def is_paused(self) -> bool:
        """Whether its reader has so much to read that it takes no turns."""
        return self._outbox.is_behind and self.interruption() is None

    async def __aiter__(self) -> AsyncIterator[EngineEvent]:
        """The events of the job; raises its error."""
        if await self._expires_waiting():
            for index, row in enumerate(self.job.rows):
                yield RowFinished(index, FinishReason.TIME_LIMIT, "", "", empty_receipts(row.plan))
            return
        while (message := await self._outbox.get()) is not None:
            if isinstance(message, SteerServerError):
                self.cancel()
                raise message
            yield message
        self.cancel()

    async def _expires_waiting(self) -> bool:
        """Waits until the job is taken from the queue; true when its time limit ends first."""
        try:
            async with asyncio.timeout(None if self._deadline is None else self._deadline - time.monotonic()):
                await self._taken.wait()
        except TimeoutError:
            return self._queue.leave(self)
        return False

    def cancel(self) -> None:
        """Removes the job from the queue, or stops it at its next step; nobody reads what is left."""
        self.stop()
        self._outbox.close()
        self._queue.leave(self)

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

    def post(self, *messages: Message) -> None:
        """Sends messages to the stream. Called by the decoding thread."""
        try:
            # Once for all of a turn: waking the event loop costs the thread a wait for the interpreter.
            self._loop.call_soon_threadsafe(self._receive, messages)
        except RuntimeError:
            # The event loop is closed, and with it the stream.
            self._cancelled.set()

    def _receive(self, messages: tuple[Message, ...]) -> None:
        for message in messages:
            self._outbox.put(message)
        self._taken.set()


class JobQueue:
    """The jobs that wait, and those that are decoded at once: few enough for the memory, fair between clients."""

    def __init__(self, limit: int, *, max_running: int = MAX_RUNNING, memory: DecodeMemory | None = None) -> None:
        """``limit``: see :class:`FairQueue`. ``max_running``: a quarter of them, but one, may be one client's."""
        self._memory = memory
        self._room = DecodeRoom(max_running, memory)
        self._jobs: FairQueue[QueuedJob] = FairQueue(limit, self._room)
        self._changed = threading.Condition()
        self._refusal: Callable[[], SteerServerError] | None = None

    def __len__(self) -> int:
        return len(self._jobs.waiting)

    @property
    def running(self) -> int:
        """Jobs that are being decoded."""
        return len(self._jobs.running)

    @property
    def undelivered(self) -> int:
        """Jobs that have been decoded, and whose readers have not taken all of it."""
        return self._jobs.undelivered

    @property
    def memory(self) -> int:
        """Bytes that the jobs take that are being decoded. Any thread may ask."""
        return self._room.taken

    @property
    def is_closed(self) -> bool:
        """Whether no job begins any more."""
        return self._refusal is not None

    @property
    def share(self) -> int:
        """Of the jobs that are decoded at once, how many may be one client's."""
        return self._room.share

    def check(self, job: DecodeJob) -> None:
        """Raises :class:`InvalidRequestError` for a job that does not fit into memory, were it alone."""
        if self._memory is not None:
            self._memory.needed(job)

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
            self._jobs.put(queued)
            self._changed.notify()
        return queued

    def take(self, *, wait: bool) -> QueuedJob | None:
        """The next job that can begin, if there is one; ``wait`` for it, for a moment at most where others run.

        Called by the decoding thread.
        """
        with self._changed:
            queued = self._begin()
            if queued is None and wait and self._refusal is None:
                self._changed.wait(_POLL_SECONDS if self._jobs.running else None)
                queued = self._begin()
            return queued

    def wake(self) -> None:
        """Lets the decoding thread look again at what there is to do."""
        with self._changed:
            self._changed.notify()

    def end(self, queued: QueuedJob, seconds: float) -> None:
        """A job has ended, for which the engine worked so long. Called by the decoding thread."""
        with self._changed:
            self._jobs.end(queued, seconds)

    def leave(self, queued: QueuedJob) -> bool:
        """Nobody waits for a job any more, or has all of it; whether it was waiting, and so never begins."""
        with self._changed:
            was_waiting = self._jobs.leave(queued)
            self._changed.notify()
            return was_waiting

    def close(self, refusal: Callable[[], SteerServerError] = ShuttingDownError) -> None:
        """Refuses the jobs that wait and those that come, and stops those that run."""
        with self._changed:
            self._refusal = self._refusal or refusal
            for queued in self._jobs.waiting:
                queued.post(self._refusal())
                self._jobs.leave(queued)
            for queued in self._jobs.running:
                queued.stop()
            self._changed.notify()

    def abandon(self, error: SteerServerError) -> None:
        """Ends the streams of the jobs that run: nothing more will come of them."""
        with self._changed:
            for queued in self._jobs.running:
                queued.post(error)

    def _begin(self) -> QueuedJob | None:
        return None if self._refusal is not None else self._jobs.begin_next()
