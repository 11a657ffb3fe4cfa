"""A few threads beside the event loop, of which callers get one in turn."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

from steer_server.caller import CALLER
from steer_server.errors import QueueFullError, ShuttingDownError
from steer_server.parallel import settle_cores

_T = TypeVar("_T")


class FairThreads:
    """Runs functions in ``count`` threads. Of those that wait, each caller's first comes before anybody's second.

    Used from one event loop.
    """

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=settle_cores)
        self._free = count
        self._closed = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By caller, in the order of their turns."""

    async def run(self, function: Callable[[], _T]) -> _T:
        """What the function returns or raises. Raises :class:`ShuttingDownError` once this is closed.

        A caller that gives up keeps the thread busy until the function ends: nobody else gets it before.
        """
        if self._closed:
            raise ShuttingDownError
        loop = asyncio.get_running_loop()
        if self._free:
            self._free -= 1
        else:
            await self._turn(loop)
        if self._closed:
            raise ShuttingDownError
        running = self._pool.submit(function)
        running.add_done_callback(lambda _: self._freed(loop))
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        """Refuses those who wait and who come. What runs goes on to its end."""
        self._closed = True
        for waiting in self._waiting.values():
            for turn in waiting:
                if not turn.done():
                    turn.set_exception(ShuttingDownError())
        self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        turn: asyncio.Future[None] = loop.create_future()
        host = CALLER.get().host
        self._waiting.setdefault(host, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                # The turn came at the moment it was given up.
                self._pass_on()
            else:
                self._forget(host, turn)
            raise

    def _forget(self, host: str, turn: asyncio.Future[None]) -> None:
        """Those who gave up do not cost the others of their host a turn."""
        waiting = self._waiting.get(host)
        if waiting is not None and turn in waiting:
            waiting.remove(turn)
            if not waiting:
                del self._waiting[host]

    def _freed(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # a loop that has ended has nobody waiting
            loop.call_soon_threadsafe(self._pass_on)

    def _pass_on(self) -> None:
        while self._waiting:
            caller, waiting = next(iter(self._waiting.items()))
            del self._waiting[caller]
            turn = waiting.popleft()
            if waiting:
                # Behind everybody else.
                self._waiting[caller] = waiting
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class FairRoom:
    """Places for those who wait or are served. The last quarter is for others than the one who has all the rest."""

    def __init__(self, most: int, what: str) -> None:
        """``what``: what those do who have a place, for the error of one too many."""
        self._most, self._what = most, what
        self._own = max(1, most - most // 4)
        self._taken: Counter[str] = Counter()
        """By caller."""

    @contextmanager
    def place(self) -> Iterator[None]:
        """Held while the block runs. Raises :class:`QueueFullError` where there is none for this caller."""
        caller, total = CALLER.get().host, self._taken.total()
        if total >= self._most or self._taken[caller] >= self._own:
            problem = f"{total} {self._what}; at most {self._most} are admitted, {self._own} of one caller"
            raise QueueFullError(problem, retry_after=1.0)
        self._taken[caller] += 1
        try:
            yield
        finally:
            self._taken[caller] -= 1
            self._taken += Counter()  # without callers that have none
