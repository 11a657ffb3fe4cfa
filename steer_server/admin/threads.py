"""Work in threads, which nothing can interrupt: whoever waits for it is cancelled only when it is over.

The threads are of the store's files alone: a disk that hangs holds up those who change the store, and nobody else.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from steer_server.errors import QueueFullError, ShuttingDownError
from steer_server.parallel import settle_cores

_T = TypeVar("_T")
_THREADS = 4
_MOST = 64
_AGAIN = 5.0
"""Seconds: when to try again where too many wait."""


async def until_done(work: asyncio.Future[Any]) -> bool:
    """Waits for the end of some work, however that ends. Whether the caller was cancelled meanwhile."""
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


class FileThreads:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="store", initializer=settle_cores)
        self._running, self._is_closed = 0, False

    async def ask(self, function: Callable[[], _T]) -> _T:
        """What a function returns.

        Raises :class:`QueueFullError` where too many wait for theirs, and :class:`ShuttingDownError` after the end.
        """
        if self._running >= _MOST:
            raise QueueFullError(f"{self._running} changes of the store are under way, the most accepted", _AGAIN)
        return await self.start(function)

    def start(self, function: Callable[[], _T]) -> asyncio.Future[_T]:
        """Of what is bounded already: begins it, with the caller's context. Raises :class:`ShuttingDownError`."""
        if self._is_closed:
            raise ShuttingDownError
        run = contextvars.copy_context().run
        running: asyncio.Future[_T] = asyncio.get_running_loop().run_in_executor(self._pool, run, function)
        self._running += 1
        running.add_done_callback(self._ended)
        return running

    async def to_its_end(self, function: Callable[[], _T]) -> _T:
        """What a function returns. Where the caller is cancelled, it waits for the end first."""
        running = self.start(function)
        if await until_done(running):
            with suppress(Exception):
                running.result()
            raise asyncio.CancelledError
        return running.result()

    def close(self) -> None:
        """Waits for nothing: what still runs ends by itself."""
        self._is_closed = True
        self._pool.shutdown(wait=False)

    def _ended(self, _: asyncio.Future[Any]) -> None:
        self._running -= 1
