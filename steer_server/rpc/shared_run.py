"""Work that many callers ask for and that is done once for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class SharedRun(Generic[_T]):
    """Runs a function in a thread, one run at a time, beside the event loop that it was asked from.

    Who asks while a run goes on gets the next one, which all of those share: what changed before they asked is in it.
    A run goes on when those who asked for it have left, so that no earlier run ever ends after a later one.
    """

    def __init__(self, function: Callable[[], _T]) -> None:
        self._function = function
        self._running: asyncio.Future[_T] | None = None
        self._next: asyncio.Future[_T] | None = None

    async def run(self) -> _T:
        """What a run of the function that begins after this call returns, or raises."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._run_after(self._running))
            # Retrieves the exception, of which asyncio complains where all who asked have left.
            self._next.add_done_callback(lambda run: run.cancelled() or run.exception())
        return await asyncio.shield(self._next)

    async def _run_after(self, running: asyncio.Future[_T] | None) -> _T:
        if running is not None:
            await asyncio.wait({running})
        self._running, self._next = self._next, None
        return await asyncio.to_thread(self._function)
