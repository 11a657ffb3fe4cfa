"""What the jobs that are decoded at once share: turns, and memory."""

from __future__ import annotations

from typing import Protocol

from steer_server.engine.hf.memory import DecodeMemory

_ONE_CLIENTS = 4
"""One part in so many of the jobs decoded at once, but one at least, may be one client's."""


class _Needing(Protocol):
    need: int
    """Bytes."""


class DecodeRoom:
    """Implements :class:`steer_server.engine.fair_queue.Room`."""

    def __init__(self, max_running: int, memory: DecodeMemory | None) -> None:
        self._max_running, self._memory = max_running, memory
        self._running = 0
        self.taken = 0
        """Bytes. Any thread may ask."""

    @property
    def share(self) -> int:
        """How many of the jobs that are decoded at once may be one client's."""
        return max(1, self._max_running // _ONE_CLIENTS)

    def fits(self, job: _Needing, mine: int) -> bool:
        """Whether the job can begin; its client has ``mine`` running."""
        if self._running >= self._max_running or mine >= self.share:
            return False
        return self._memory is None or self._memory.fits(job.need, self.taken, has_others=mine > 0)

    def add(self, job: _Needing) -> None:
        """A job begins."""
        self._running += 1
        self.taken += job.need

    def remove(self, job: _Needing) -> None:
        """It has ended."""
        self._running -= 1
        self.taken -= job.need

    def empty(self) -> DecodeRoom:
        """The same without jobs."""
        return DecodeRoom(self._max_running, self._memory)
