"""The jobs of one call: a few at a time are in the engine, and none fails because there is no place just then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from steer_server.engine.base import Engine, JobStream
from steer_server.engine.receipts import empty_receipts
from steer_server.errors import QueueFullError
from steer_server.types import DecodeJob, EngineEvent, FinishReason, RowFinished


@dataclass(frozen=True)
class Submitted:
    """A job has entered the engine: its first event."""

    at: float
    """When the call began to wait for it, in seconds of the monotonic clock: of all its jobs this is one moment, from
    which their time limit counts too, whether they wait in the engine or for a place there."""


@dataclass(frozen=True)
class JobEvent:
    """An event of one of the jobs; ``job``: which."""

    job: int
    event: EngineEvent | Submitted


class JobRun:
    """Decodes jobs. Whoever holds it must call :meth:`cancel` when done with it."""

    def __init__(self, engine: Engine, jobs: Sequence[DecodeJob]) -> None:
        """Submits the first job, and raises what :meth:`Engine.submit` does: then the call is refused.

        The time limit of each job counts from here.
        """
        self._engine, self._jobs = engine, jobs
        self._began = time.monotonic()
        self._streams: dict[int, JobStream] = {0: engine.submit(jobs[0])}
        self._next = 0
        # What is not read waits with the engine, which gives a reader up that stops reading.
        self._events: asyncio.Queue[JobEvent | Exception | None] = asyncio.Queue(maxsize=1)
        self._workers: list[asyncio.Task[None]] = []

    async def __aiter__(self) -> AsyncIterator[JobEvent]:
        """The events of all jobs as they come, each job's in their order. Raises the first error of any."""
        if len(self._jobs) == 1:
            # Without a task and a queue in between.
            yield JobEvent(0, Submitted(self._began))
            async for event in self._streams[0]:
                yield JobEvent(0, event)
            return
        num_workers = min(self._engine.jobs_at_once(self._jobs[0]), len(self._jobs))
        self._workers = [asyncio.ensure_future(self._work()) for _ in range(num_workers)]
        try:
            while num_workers:
                message = await self._events.get()
                if isinstance(message, Exception):
                    raise message
                if message is None:
                    num_workers -= 1
                else:
                    yield message
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Stops what is being decoded, and begins nothing more."""
        self._next = len(self._jobs)
        for worker in self._workers:
            worker.cancel()
        for stream in self._streams.values():
            stream.cancel()

    async def _work(self) -> None:
        """Decodes one job after the other, while there are any that nobody has begun."""
        try:
            while self._next < len(self._jobs):
                index, self._next = self._next, self._next + 1
                await self._decode(index)
            await self._events.put(None)
        except Exception as error:  # noqa: BLE001 - handed on to the reader
            await self._events.put(error)

    async def _decode(self, index: int) -> None:
        stream = self._streams.get(index) or await self._submit(index)
        await self._events.put(JobEvent(index, Submitted(self._began)))
        if stream is None:
            for place, row in enumerate(self._jobs[index].rows):
                end = RowFinished(place, FinishReason.TIME_LIMIT, "", "", empty_receipts(row.plan))
                await self._events.put(JobEvent(index, end))
            return
        try:
            async for event in stream:
                await self._events.put(JobEvent(index, event))
        finally:
            stream.cancel()
            del self._streams[index]

    async def _submit(self, index: int) -> JobStream | None:
        """The stream of a job, once there is a place for it; None where the time limit comes first."""
        job = self._jobs[index]
        while True:
            left = None if job.time_limit is None else job.time_limit - (time.monotonic() - self._began)
            if left is not None and left <= 0.0:
                return None
            try:
                stream = self._streams[index] = self._engine.submit(replace(job, time_limit=left))
            except QueueFullError as error:
                await asyncio.sleep(error.retry_after if left is None else min(error.retry_after, left))
            else:
                return stream
