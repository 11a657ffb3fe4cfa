"""Several requests of one client at once: threads on the blocking client, tasks on the asyncio client."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from steer_client._dual_method import run_to_end
from steer_client._translate import cancelled


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the work that was started under `key`: a result or an error."""

    key: int
    #: None where there is an error.
    result: Any
    error: Exception | None


class Pool(Protocol):
    """Starts coroutines, and says when each has ended."""

    def start(self, key: int, work: Coroutine[Any, Any, Any]) -> None:
        """Runs it beside the others."""

    async def next(self) -> Outcome:
        """Waits for the next one to end."""

    def ended(self) -> Iterator[Outcome]:
        """Those that have ended already; waits for nothing."""

    def stop(self) -> None:
        """Lets go of what still runs."""


class ThreadPool:
    """Runs coroutines that never suspend, each in a thread."""

    def __init__(self) -> None:
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    def start(self, key: int, work: Coroutine[Any, Any, Any]) -> None:
        # A thread that waits for a busy server must not keep the process from ending.
        # It belongs to the trace of who starts it.
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(self._run, key, work), daemon=True).start()

    def _run(self, key: int, work: Coroutine[Any, Any, Any]) -> None:
        try:
            self._outcomes.put(Outcome(key, run_to_end(work), None))
        except Exception as error:  # noqa: BLE001 - raised where the outcome is read
            self._outcomes.put(Outcome(key, None, error))

    async def next(self) -> Outcome:
        return self._outcomes.get()

    def ended(self) -> Iterator[Outcome]:
        while not self._outcomes.empty():
            yield self._outcomes.get()

    def stop(self) -> None:
        # The connection is closed by whoever opened it, which ends the calls of the threads.
        pass


class TaskPool:
    """Runs coroutines as tasks of the running loop."""

    def __init__(self) -> None:
        self._outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, key: int, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(self._run(key, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, key: int, work: Coroutine[Any, Any, Any]) -> None:
        try:
            outcome = Outcome(key, await work, None)
        except asyncio.CancelledError:
            # Perhaps by others than `stop`: whoever waits for it must not wait for ever.
            self._outcomes.put_nowait(Outcome(key, None, cancelled()))
            raise
        except Exception as error:  # noqa: BLE001 - raised where the outcome is read
            outcome = Outcome(key, None, error)
        self._outcomes.put_nowait(outcome)

    async def next(self) -> Outcome:
        return await self._outcomes.get()

    def ended(self) -> Iterator[Outcome]:
        while not self._outcomes.empty():
            yield self._outcomes.get_nowait()

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
