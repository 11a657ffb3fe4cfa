"""What the jobs inside vLLM share: rows of its batch, and the workers' memory for steering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from operators.core.artifact import OperatorArtifact
from steer_server.engine.vllm.job_memory import JobMemory
from steer_server.engine.vllm.operator_room import OperatorRoom

_KEPT_FOR_OTHERS = 8
"""One part in so many of the rows is left to clients that have nothing running."""


class _Seated(Protocol):
    size: int
    """Rows."""
    operators: Sequence[OperatorArtifact]
    memory: JobMemory


class Seats:
    """Implements :class:`steer_server.engine.fair_queue.Room`.

    So what waits inside vLLM, first come, first served, are the rows of one job at most.
    """

    def __init__(self, rows: int, operators: OperatorRoom) -> None:
        """``rows``: that vLLM decodes at once. A job of more of them runs alone."""
        self._rows, self._operators = rows, operators
        self._taken = 0

    def fits(self, job: _Seated, mine: int) -> bool:
        """Whether the job can begin; its client has ``mine`` rows running."""
        kept = self._rows // _KEPT_FOR_OTHERS if mine else 0
        has_seats = self._taken + job.size <= self._rows - kept or not self._taken
        return has_seats and self._operators.fits(job.operators, job.memory)

    def add(self, job: _Seated) -> None:
        """A job begins."""
        self._taken += job.size
        self._operators.add(job.operators, job.memory)

    def remove(self, job: _Seated) -> None:
        """It has ended."""
        self._taken -= job.size
        self._operators.remove(job.operators, job.memory)

    def empty(self) -> Seats:
        """The same without jobs."""
        return Seats(self._rows, self._operators.empty())
