"""Whose turn it is, among the jobs that are decoded at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

_T = TypeVar("_T", bound=Hashable)
_Path = tuple[Hashable, ...]

_HEAD_START = 0.25
"""Seconds that whoever joins may be ahead of those that are there."""
_HEAD_START_EVERY = 4
"""So many times the seconds by which someone was ahead pass until the next one may be: a long text keeps half of its
share and more beside any number of clients that come, ask for little and leave."""


@dataclass
class _Group:
    """Hosts, the connections of a host, or the jobs of a connection."""

    seconds: float = 0.0
    """That all of them have used."""
    level: float = 0.0
    """What the one had used whose turn it was. It never goes down: who joins does not make up for being late."""
    next_head_start: float = 0.0
    """In ``seconds``."""
    ahead: _Path = ()
    """Who got the last one."""


class FairTurns(Generic[_T]):
    """Of the hosts the one that has used least time, of its connections the one that has, and so of its jobs.

    So a short job waits for one turn of each other client, not for their ends, and many connections or jobs get no more
    than one. A client or job that joins starts level with the others, or a little ahead of them: a text of a few tokens
    is often done before it has to share.
    """

    def __init__(self, path_of: Callable[[_T], _Path]) -> None:
        """``path_of``: host, connection and the job itself."""
        self._path_of = path_of
        self._jobs: list[_T] = []
        self._used: dict[_Path, float] = {}
        """Seconds, by path and by each of its beginnings, from where its group stood when it joined."""
        self._groups: dict[_Path, _Group] = {(): _Group()}
        """By the path that they share."""

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[_T]:
        return iter(self._jobs)

    def add(self, job: _T) -> None:
        """A job that takes turns from now on."""
        for branch in self._branches(job):
            if branch not in self._used:
                self._join(branch, self._groups.setdefault(branch[:-1], _Group()))
        self._jobs.append(job)

    def remove(self, job: _T) -> None:
        """A job that has ended."""
        self._jobs.remove(job)
        kept = {branch for other in self._jobs for branch in self._branches(other)}
        for branch in reversed(self._branches(job)):
            if branch not in kept:
                self._leave(branch, self._groups[branch[:-1]])
                self._groups.pop(branch, None)

    def next(self) -> _T:
        """The job whose turn it is."""
        jobs = self._jobs
        for depth in range(1, 1 + len(self._path_of(jobs[0]))):
            branch = min((self._path_of(job)[:depth] for job in jobs), key=self._used.__getitem__)
            group = self._groups[branch[:-1]]
            group.level = max(group.level, self._used[branch])
            jobs = [job for job in jobs if self._path_of(job)[:depth] == branch]
        return jobs[0]

    def charge(self, job: _T, seconds: float) -> None:
        """Books the time of a turn."""
        for branch in self._branches(job):
            self._used[branch] += seconds
            self._groups[branch[:-1]].seconds += seconds

    def _join(self, branch: _Path, group: _Group) -> None:
        self._used[branch] = group.level
        is_alone = all(other == branch or other[:-1] != branch[:-1] for other in self._used)
        if not is_alone and group.seconds >= group.next_head_start:
            self._used[branch] -= _HEAD_START
            group.ahead = branch
            group.next_head_start = group.seconds + _HEAD_START_EVERY * _HEAD_START

    def _leave(self, branch: _Path, group: _Group) -> None:
        used = self._used.pop(branch)
        if branch == group.ahead:
            # What it has not used of its head start, others may have.
            group.ahead = ()
            group.next_head_start -= _HEAD_START_EVERY * min(max(group.level - used, 0.0), _HEAD_START)

    def _branches(self, job: _T) -> list[_Path]:
        path = self._path_of(job)
        return [path[: depth + 1] for depth in range(len(path))]
