"""How many calls are under way at once, and what becomes of one too many."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import structlog

from steer_server.caller import Caller
from steer_server.errors import QueueFullError, RequestIncompleteError, ShuttingDownError
from steer_server.rpc.call_record import current_call

log = structlog.get_logger(__name__)

_Key = TypeVar("_Key")

_REPORT_SECONDS = 1.0
_HINT_SECONDS = (1.0, 4.0)
"""Drawn from, so that those who were refused together do not come back together."""
_KEPT = 4
"""One part in so many of the places is for hosts that hold few."""
_SLOW_SECONDS = 2.0
"""What a request may take to arrive, where its place is needed and nobody has more such calls."""


class CallLimit:
    """At most ``most`` calls at once. Belongs to one event loop.

    The last quarter of the places is for hosts that hold few: nobody keeps others out by calls that take long.
    Where there is no place, a call whose request has not arrived gives its place to a new one: the oldest of the host
    that has the most of those, and there of the connection that has, if the new call's has fewer; else one that waits
    for its request for two seconds. So nobody keeps others out by calls without requests, however many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._calls: Counter[str] = Counter()
        """Under way, by host."""
        self._arriving: dict[Place, None] = {}
        """Calls whose request has not arrived, in the order in which they began."""
        self._of_host: Counter[str] = Counter()
        self._of_client: Counter[tuple[str, str]] = Counter()
        """Of the calls that are arriving."""
        self._refused = 0
        self._reporting = False
        self._is_closed = False

    @property
    def calls(self) -> int:
        """Calls under way."""
        return self._calls.total()

    @contextmanager
    def admitted(self, caller: Caller) -> Iterator[Place]:
        """Counts a call while the block runs.

        Raises:
            QueueFullError: it is one too many, or one of a host that has its part.
            ShuttingDownError: the limit was closed before.
        """
        if self._is_closed:
            raise ShuttingDownError
        if problem := self._problem(caller.host):
            slow = self._slow(caller)
            if slow is None:
                raise self._refuse(problem)
            _take_one(self._calls, slow.caller.host)
            slow.give_up()
        place = Place(self, caller)
        self._calls[caller.host] += 1
        try:
            yield place
        finally:
            if not place.is_taken:
                _take_one(self._calls, caller.host)

    def close(self) -> None:
        """Refuses all calls from here on; those under way go on."""
        self._is_closed = True

    def _problem(self, host: str) -> str:
        """Why there is no place for one more of a host; empty where there is."""
        calls, own, kept = self.calls, self._calls[host], self._most // _KEPT
        if calls >= self._most:
            return f"{self._most} calls are under way already, the most admitted"
        # Who has less than a part of those that are kept gets one of them; at least one.
        if calls < self._most - kept or own < max(1, kept // len(self._calls.keys() | {host})):
            return ""
        return (
            f"{calls} calls are under way, {own} of them from where this one comes; the last {kept} of the "
            f"{self._most} that are admitted are for others"
        )

    def _slow(self, caller: Caller) -> Place | None:
        """The call that gives its place to one of this caller."""
        if not self._arriving:
            return None
        host, calls = max(self._of_host.items(), key=lambda item: item[1])
        if host != caller.host:
            # Of calls that have come too: who holds many takes no place from one who holds few.
            if calls > self._of_host[caller.host] + 1 and self._calls[host] > self._calls[caller.host] + 1:
                return next(place for place in self._arriving if place.caller.host == host)
        else:
            own = ((count, client) for client, count in self._of_client.items() if client[0] == host)
            calls, client = max(own)
            if calls > self._of_client[caller.client] + 1:
                return next(place for place in self._arriving if place.caller.client == client)
        holding = self._calls[caller.host]
        oldest = next((place for place in self._arriving if self._calls[place.caller.host] >= holding), None)
        return oldest if oldest is not None and time.monotonic() - oldest.since > _SLOW_SECONDS else None

    @contextmanager
    def _arrives(self, place: Place) -> Iterator[None]:
        self._arriving[place] = None
        self._of_host[place.caller.host] += 1
        self._of_client[place.caller.client] += 1
        try:
            yield
        finally:
            self._forget(place)

    def _forget(self, place: Place) -> None:
        if place not in self._arriving:
            return
        del self._arriving[place]
        _take_one(self._of_host, place.caller.host)
        _take_one(self._of_client, place.caller.client)

    def _refuse(self, problem: str) -> QueueFullError:
        # A line for each of thousands would hold up those that are admitted.
        current_call().is_refused = True
        self._refused += 1
        if not self._reporting:
            self._reporting = True
            asyncio.get_running_loop().call_later(_REPORT_SECONDS, self._report)
        return QueueFullError(problem, random.uniform(*_HINT_SECONDS))  # noqa: S311 - no secret

    def _report(self) -> None:
        log.warning("calls refused", refused=self._refused, max_calls=self._most)
        self._refused, self._reporting = 0, False


def _take_one(counter: Counter[_Key], key: _Key) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


class Place:
    """Of one call, as long as nobody else needs it more."""

    def __init__(self, limit: CallLimit, caller: Caller) -> None:
        self._limit, self.caller = limit, caller
        self.since = time.monotonic()
        self.is_taken = False
        self._timeout: asyncio.Timeout | None = None

    @asynccontextmanager
    async def request(self, patience: float) -> AsyncIterator[None]:
        """Around the wait for the request.

        Raises:
            RequestIncompleteError: it has not arrived after so many seconds.
            QueueFullError: another call has got this one's place.
        """
        try:
            async with asyncio.timeout(patience) as self._timeout:
                with self._limit._arrives(self):
                    yield
        except TimeoutError:
            if not self.is_taken:
                raise RequestIncompleteError(patience) from None
        if self.is_taken:
            # Also where the request arrived at that very moment.
            raise self._limit._refuse(
                "all calls that are admitted are under way, and another one needed the place of this one, whose request"
                " had not arrived"
            )

    def give_up(self) -> None:
        """Ends the wait: the place is another's."""
        self.is_taken = True
        self._limit._forget(self)
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())
