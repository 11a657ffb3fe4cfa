"""Jobs from their admission to their delivery: which wait, which is decoded next, and which nobody has taken yet.

Next is a job of the host, and of its connections the one, that has the fewest running, or of several such the one that
began its last job before the others. One for which there is no room
yet is passed by others that fit. After a while they may take only what it leaves free once it runs, so that they do not
put it off: it begins when those have ended that ran before.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from steer_server.caller import Caller
from steer_server.engine.waiting_room import WaitingRoom

PATIENCE = 30.0
"""Seconds after which a job that waits is not put off by others any more."""
_MAX_REMEMBERED = 4096
"""Hosts and clients whose latest turn is known; the others come before them."""


class FairJob(Protocol):
    """What is queued."""

    @property
    def caller(self) -> Caller:
        """For whom it is."""
        ...

    @property
    def size(self) -> int:
        """How much it counts among those of its client that run."""
        ...


_J = TypeVar("_J", bound=FairJob)


class Room(Protocol[_J]):
    """What the jobs that are decoded at once have to share."""

    def fits(self, job: _J, mine: int) -> bool:
        """Whether it can begin beside those that were added; its client has ``mine`` of them."""
        ...

    def add(self, job: _J) -> None:
        """Takes what it needs."""
        ...

    def remove(self, job: _J) -> None:
        """Gives it back."""
        ...

    def empty(self) -> Room[_J]:
        """As much room, with nothing in it."""
        ...


class FairQueue(Generic[_J]):
    """Not locked: whoever uses it from several threads does that."""

    def __init__(self, limit: int, room: Room[_J], *, clock: Callable[[], float] = time.monotonic) -> None:
        """``limit``: of the jobs that wait or are not delivered; see :class:`WaitingRoom`."""
        self._places, self._room, self._clock = WaitingRoom(limit, clock=clock), room, clock
        self._waiting: dict[_J, float] = {}
        """With the time at which each came, as it came."""
        self._running: dict[_J, float] = {}
        """With the time at which each began."""
        self._undelivered: set[_J] = set()
        self._forsaken: set[_J] = set()
        """Running, with nobody who reads."""
        self._num_running: Counter[str | tuple[str, str]] = Counter()
        """By host and by client, in sizes."""
        self._last_begun: dict[str | tuple[str, str], int] = {}
        """By host and by client, the latest last: which of all the jobs was the latest of theirs."""
        self._num_begun = 0

    @property
    def waiting(self) -> list[_J]:
        """Those that have not begun."""
        return list(self._waiting)

    @property
    def running(self) -> list[_J]:
        """Those that are decoded."""
        return list(self._running)

    @property
    def undelivered(self) -> int:
        """How many have been decoded, and wait for a reader that has not taken all of it."""
        return len(self._undelivered)

    def hint(self) -> float:
        """Seconds after which a place is likely to be free."""
        return self._places.hint()

    def put(self, job: _J) -> None:
        """Adds a job. Raises :class:`QueueFullError` where there is no place to wait, with a hint when there may be."""
        self._places.enter(job.caller)
        self._waiting[job] = self._clock()

    def begin_next(self) -> _J | None:
        """The job that begins now; None where none can."""
        job = self._next()
        if job is not None:
            del self._waiting[job]
            self._places.leave(job.caller)
            self._running[job] = self._clock()
            self._room.add(job)
            self._num_running.update({job.caller.host: job.size, job.caller.client: job.size})
            self._note_turn(job.caller)
        return job

    def end(self, job: _J, seconds: float) -> None:
        """A running job has been decoded, for which the engine worked so long. It keeps a place until delivered."""
        del self._running[job]
        self._room.remove(job)
        self._num_running.subtract({job.caller.host: job.size, job.caller.client: job.size})
        self._num_running += Counter()
        self._places.record(seconds)
        if job in self._forsaken:
            self._forsaken.remove(job)
        else:
            self._places.enter_late(job.caller)
            self._undelivered.add(job)

    def leave(self, job: _J) -> bool:
        """Nobody waits for a job any more, or has all of it; whether it was waiting, and so never begins."""
        if job in self._waiting:
            del self._waiting[job]
            self._places.leave(job.caller)
            return True
        if job in self._running:
            self._forsaken.add(job)
        elif job in self._undelivered:
            self._undelivered.remove(job)
            self._places.leave(job.caller)
        return False

    def _note_turn(self, caller: Caller) -> None:
        self._num_begun += 1
        for who in (caller.host, caller.client):
            # Put at the end.
            self._last_begun.pop(who, None)
            self._last_begun[who] = self._num_begun
        while len(self._last_begun) > _MAX_REMEMBERED:
            del self._last_begun[next(iter(self._last_begun))]

    def _turn(self, job: _J) -> tuple[int, ...]:
        host, client = job.caller.host, job.caller.client
        count, last = self._num_running, self._last_begun
        return count[host], last.get(host, 0), count[client], last.get(client, 0)

    def _next(self) -> _J | None:
        now, count = self._clock(), self._num_running
        put_off: set[tuple[str, str]] = set()
        """Clients with a job that has waited for long: none of theirs passes it."""
        beside: Room[_J] | None = None
        """With the first of those jobs in it, of a client that has nothing running, and with those that passed it."""
        # The sort is stable: among equals first come, first served.
        for job in sorted(self._waiting, key=self._turn):
            client, mine = job.caller.client, count[job.caller.client]
            may_pass = client not in put_off and (beside is None or beside.fits(job, mine))
            if may_pass and self._room.fits(job, mine):
                return job
            long_ago = now - PATIENCE
            if self._waiting[job] < long_ago:
                put_off.add(client)
                if beside is None and not mine:
                    beside = self._room.empty()
                    beside.add(job)
                    for passed, began in self._running.items():
                        if began > self._waiting[job] + PATIENCE:
                            beside.add(passed)
        return None
