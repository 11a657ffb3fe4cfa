"""Who may wait, when more ask than an engine can serve: places shared between clients, and a line of those refused.

A client is a connection. Where places are contended, each host may fill its share of them, each of its connections a
share of that, and no more; some places are for clients that have nothing waiting, and as many for hosts, so that no
host keeps others out by its number of connections. A client that is refused has a place in a line, and a hint when to
come back: who does so finds its place kept, and who asks again before goes to the end of the line.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from steer_server.caller import Caller
from steer_server.errors import QueueFullError

_MAX_LINE = 256
_MIN_HINT, _MAX_HINT = 1.0, 60.0
_SOONEST = 0.6
"""Of the estimate: those who wait come back spread out, and who comes too soon keeps its place in the line."""
_SMOOTHING = 0.2
"""Weight of the newest request in the moving average of how long one takes."""

_Client = tuple[str, str]
"""Host and connection."""


@dataclass(frozen=True)
class _Ticket:
    """Of a client in the line: when it was told to come back, and until when its place is kept."""

    due: float
    expires: float


class WaitingRoom:
    """Counts what each client has waiting. The thread of the event loop enters; any thread may leave."""

    def __init__(self, limit: int, *, things: str = "requests", clock: Callable[[], float] = time.monotonic) -> None:
        """``limit`` places for all, a quarter as many again for clients that have nothing waiting, and for hosts."""
        self._limit, self._extra = limit, max(1, limit // 4)
        self._things, self._clock = things, clock
        self._held: Counter[_Client] = Counter()
        self._line: OrderedDict[_Client, _Ticket] = OrderedDict()
        self._seconds_each: float | None = None
        self._lock = threading.Lock()

    def enter(self, caller: Caller, size: int = 1) -> None:
        """Takes ``size`` places, until :meth:`leave`.

        Raises:
            QueueFullError: there is no place, or the caller's deadline ends before its turn can come.
        """
        with self._lock:
            now = self._clock()
            for client in [client for client, ticket in self._line.items() if ticket.expires < now]:
                del self._line[client]
            self._check_deadline(caller, now)
            self._check_share(caller, size)
            if not self._is_admitted(caller.client, size):
                raise self._refusal(caller.client, now)
            self._line.pop(caller.client, None)
            self._held[caller.client] += size

    def enter_late(self, caller: Caller) -> None:
        """Takes a place, whether there is one or not: for what has been admitted before."""
        with self._lock:
            self._held[caller.client] += 1

    def leave(self, caller: Caller, size: int = 1) -> None:
        """Gives ``size`` places back."""
        with self._lock:
            self._held[caller.client] -= size
            if self._held[caller.client] <= 0:
                del self._held[caller.client]

    def record(self, seconds: float) -> None:
        """How long the engine worked for a request: what hints are estimated from."""
        with self._lock:
            mean = seconds if self._seconds_each is None else self._seconds_each
            self._seconds_each = mean + _SMOOTHING * (seconds - mean)

    def hint(self, places: int = 1) -> float:
        """Seconds after which so many places are likely to have been freed, not the same for everybody."""
        each = 1.0 if self._seconds_each is None else self._seconds_each
        return min(max(places * each, _MIN_HINT), _MAX_HINT) * random.uniform(_SOONEST, 1.0)  # noqa: S311 - no secret

    def _check_share(self, caller: Caller, size: int) -> None:
        """Raises :class:`QueueFullError` for more places than the caller's token may have, free ones or not."""
        share = caller.grant.queue_share
        if share is None:
            return
        most = max(1, int(share * self._limit))
        held = sum(count for (host, _), count in self._held.items() if host == caller.host)
        if held + size > most:
            raise QueueFullError(
                f"{held} {self._things} of token {caller.grant.token!r} wait or are unread, and it may have {most}",
                self.hint(held + size - most),
            )

    def _is_admitted(self, client: _Client, size: int) -> bool:
        total, mine = self._held.total(), self._held[client]
        if not mine and total + size > self._limit:
            # A place beyond the limit, for those of the line in their order.
            if self._is_new(client[0]) and total + self._hosts_before(client) + size <= self._limit + 2 * self._extra:
                return True
            return total + self._clients_before(client) + size <= self._limit + self._extra or not total
        hosts, beside = self._clients(client)
        share = max(1, self._limit // hosts // beside)
        return total + size <= self._limit and (not self._line or mine + size <= share)

    def _clients(self, client: _Client) -> tuple[int, int]:
        """How many hosts hold places or are in the line, this one counted, and how many clients of its own."""
        clients = {client, *self._held, *self._line}
        return len({host for host, _ in clients}), sum(host == client[0] for host, _ in clients)

    def _is_new(self, host: str) -> bool:
        return all(other != host for other, _ in self._held)

    def _before(self, client: _Client) -> list[_Client]:
        """Those of the line that come before it."""
        line = list(self._line)
        return line[: line.index(client)] if client in self._line else line

    def _clients_before(self, client: _Client) -> int:
        return len(self._before(client))

    def _hosts_before(self, client: _Client) -> int:
        """However many connections of a host are in the line, it is one host; and one that holds places has its own."""
        return len({host for host, _ in self._before(client) if host != client[0] and self._is_new(host)})

    def _refusal(self, client: _Client, now: float) -> QueueFullError:
        held = self._held.total()
        if self._held[client]:
            wait = self.hint(max(held, self._limit) - self._limit + 1 + len(self._line))
            return QueueFullError(f"{held} {self._things} wait or are unread, {self._held[client]} of them yours", wait)
        ticket = self._line.get(client)
        if ticket is None or now < ticket.due:
            self._line.pop(client, None)
        places = self._hosts_before(client) if self._is_new(client[0]) else self._clients_before(client)
        wait = self.hint(places + 1)
        if len(self._line) < _MAX_LINE or client in self._line:
            # Assigning keeps the place of one who came when it was due.
            self._line[client] = _Ticket(now + 0.9 * wait, now + 2.0 * wait + 5.0)
        return QueueFullError(
            f"{held} {self._things} wait or are unread, and {places} clients are before this one", wait
        )

    def _check_deadline(self, caller: Caller, now: float) -> None:
        if caller.deadline is None or self._seconds_each is None:
            return
        hosts, beside = self._clients(caller.client)
        wait = min(self._held.total(), self._held[caller.client] * hosts * beside) * self._seconds_each
        left = caller.deadline - now
        if wait > left:
            problem = f"it would wait for about {wait:.1f} s, and its deadline is in {max(0.0, left):.1f} s"
            raise QueueFullError(problem, min(max(wait, _MIN_HINT), _MAX_HINT))
