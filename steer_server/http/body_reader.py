"""From a body to what is asked: a short one at once, a longer one in a thread, so that it holds up nobody else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from steer_server.fair_threads import FairThreads
from steer_server.http.bodies import BodyLimits, BodyRoom, read_object

_T = TypeVar("_T")

_AT_ONCE = 16 << 10
"""Bytes that are read in a millisecond or two."""
_LONG = 1 << 20
"""Bytes from which a body waits for others of its size alone."""
_THREADS, _LONG_THREADS = 2, 1


class BodyReader:
    """The threads of one door. Of those that wait, each caller's first comes before anybody's second."""

    def __init__(self, limits: BodyLimits) -> None:
        self.limits, self.room = limits, BodyRoom(limits)
        self._threads = FairThreads(_THREADS, "body")
        self._long = FairThreads(_LONG_THREADS, "body-long")

    async def read(self, data: bytes, make: Callable[[Any], _T]) -> _T:
        """What ``make`` makes of the JSON object in these bytes.

        Raises what :func:`~steer_server.http.bodies.read_object` and ``make`` do, and :class:`ShuttingDownError`.
        """
        if len(data) <= _AT_ONCE:
            return make(read_object(data, self.limits))
        threads = self._threads if len(data) <= _LONG else self._long
        return await threads.run(lambda: make(read_object(data, self.limits)))

    def close(self) -> None:
        """Reads no more."""
        self._threads.close()
        self._long.close()
