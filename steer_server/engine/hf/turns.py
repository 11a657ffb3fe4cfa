"""Whose turn it is, among the jobs that are decoded at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

_T = TypeVar("_T", bound=Hashable)
_Path = tuple[Hashable, ...]


class FairTurns(Generic[_T]):
    """Of the hosts the one that has used least time, of its connections the one that has, and so of its jobs.

    So a short job waits for one turn of each other client, not for their ends, and many connections or jobs get no more
    than one. A client or job that joins starts level with the least of the others: it neither catches up nor waits.
    """

    def __init__(self, path_of: Callable[[_T], _Path]) -> None:
        """``path_of``: host, connection and the job itself."""
        self._path_of = path_of
        self._jobs: list[_T] = []
        self._used: dict[_Path, float] = {}
        """Seconds, by path and by each of its beginnings."""

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[_T]:
        return iter(self._jobs)

    def add(self, job: _T) -> None:
        """A job that takes turns from now on."""
        for branch in self._branches(job):
            if branch not in self._used:
                siblings = [used for other, used in self._used.items() if other[:-1] == branch[:-1]]
                self._used[branch] = min(siblings, default=0.0)
        self._jobs.append(job)

    def remove(self, job: _T) -> None:
        """A job that has ended."""
        self._jobs.remove(job)
        kept = {branch for other in self._jobs for branch in self._branches(other)}
        self._used = {branch: used for branch, used in self._used.items() if branch in kept}

    def next(self) -> _T:
        """The job whose turn it is."""
        jobs = self._jobs
        for depth in range(1, 1 + len(self._path_of(jobs[0]))):
            branch = min((self._path_of(job)[:depth] for job in jobs), key=self._used.__getitem__)
            jobs = [job for job in jobs if self._path_of(job)[:depth] == branch]
        return jobs[0]

    def charge(self, job: _T, seconds: float) -> None:
        """Books the time of a turn."""
        for branch in self._branches(job):
            self._used[branch] += seconds

    def _branches(self, job: _T) -> list[_Path]:
        path = self._path_of(job)
        return [path[: depth + 1] for depth in range(len(path))]
