"""What running jobs need of a worker's memory for steering: each operator once, pushes, and what is kept for scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from operators.core.apply import prepared_bytes
from operators.core.artifact import OperatorArtifact
from steer_server.engine.vllm.job_memory import JobMemory

NO_MEMORY = JobMemory()


class OperatorRoom:
    """Who needs what, of ``budget`` bytes."""

    def __init__(self, budget: int, pushes: Callable[[int], int] = lambda _layers: 0) -> None:
        """``pushes``: bytes of a step's pushes, by the largest number of layers at which a request is pushed."""
        self._budget, self._pushes = budget, pushes
        self._num_jobs: Counter[int] = Counter()
        """How many jobs need the pushes of so many layers."""
        self._held = 0
        """Bytes that jobs hold beside operators."""
        self._num_holders: Counter[str] = Counter()
        """How many jobs need an operator."""
        self._sizes: dict[str, int] = {}
        """Bytes of the operators that have holders."""

    def __contains__(self, digest: str) -> bool:
        """Whether a job needs this operator."""
        return digest in self._sizes

    @property
    def left(self) -> int:
        """Bytes for operators, those that no job needs any more included."""
        return self._budget - self._pushes(max(self._num_jobs, default=0)) - self._held

    def fits(self, artifacts: Iterable[OperatorArtifact], memory: JobMemory = NO_MEMORY) -> bool:
        """Whether there is room for a job with these operators."""
        new = {artifact.digest: artifact for artifact in artifacts if artifact.digest not in self._sizes}
        operators = sum(self._sizes.values()) + sum(map(prepared_bytes, new.values()))
        layers = max((memory.layers, *self._num_jobs))
        return operators + self._pushes(layers) + self._held + memory.held <= self._budget

    def add(self, artifacts: Iterable[OperatorArtifact], memory: JobMemory = NO_MEMORY) -> None:
        """A job begins."""
        sizes = {artifact.digest: prepared_bytes(artifact) for artifact in artifacts}
        self._sizes |= sizes
        self._num_holders.update(sizes.keys())
        self._num_jobs[memory.layers] += 1
        self._held += memory.held

    def remove(self, artifacts: Iterable[OperatorArtifact], memory: JobMemory = NO_MEMORY) -> None:
        """A job that was added has ended. Raises :class:`ValueError` for operators that no job needs."""
        digests = {artifact.digest for artifact in artifacts}
        if unheld := digests - self._num_holders.keys():
            raise ValueError(f"operators are released that nobody holds: {', '.join(sorted(unheld))}")
        self._num_holders.subtract(digests)
        for digest in digests:
            if not self._num_holders[digest]:
                del self._num_holders[digest], self._sizes[digest]
        self._num_jobs[memory.layers] -= 1
        # Drops the counts that are 0.
        self._num_jobs += Counter()
        self._held -= memory.held

    def empty(self) -> OperatorRoom:
        """The same without jobs."""
        return OperatorRoom(self._budget, self._pushes)
