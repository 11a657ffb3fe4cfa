"""Which operators the workers hold: loaded before a request that needs them, kept while it runs, then until evicted.

Operators are known by their digest, so replacing the file behind a name leaves requests alone that began with the old
one. Room is reserved before anything is loaded, so what the workers hold never exceeds the budget.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable

from operators.core.apply import prepared_bytes
from operators.core.artifact import OperatorArtifact
from operators.core.capacity import format_bytes
from steer_server.engine.vllm.job_memory import JobMemory
from steer_server.errors import InvalidRequestError, OperatorUnusableError, QueueFullError
from steer_server.types import DecodeJob

Load = Callable[[OperatorArtifact], Awaitable[None]]
"""Loads an operator into all workers. If it fails, no worker keeps any part of it."""
Unload = Callable[[list[str]], Awaitable[None]]
"""Removes operators from all workers, by digest."""
MAX_OPERATORS_KEPT = 4096
"""What is kept beyond the operators that running requests hold: words make many small ones, each with a cost beside its
numbers."""
NO_MEMORY = JobMemory()
_MAX_NAMED = 4
"""Operators that an error message lists."""


def required_operators(job: DecodeJob, *, budget: int, pushes: int = 0, held: int = 0) -> list[OperatorArtifact]:
    """The operators that the workers must have for a job, each once.

    Args:
        budget: bytes for steering in a worker.
        pushes: bytes of it that a step of the job takes for pushes.
        held: bytes of it that the job takes for hidden states that are kept.

    Raises:
        OperatorUnusableError: one, with the pushes, takes more than ``budget`` bytes.
        InvalidRequestError: all of it together does.
    """
    plans = [row.plan for row in job.rows if row.plan is not None]
    uses = {use.artifact.digest: use for plan in plans for use in plan.applications if use.setting.strength}
    sizes = {digest: prepared_bytes(use.artifact) for digest, use in uses.items()}
    for digest, size in sizes.items():
        if size + pushes > budget:
            raise OperatorUnusableError(
                uses[digest].name,
                f"it takes {format_bytes(size)} in a worker; this server keeps {format_bytes(budget)} for operators "
                "(--operator-memory)",
            )
    if sizes and sum(sizes.values()) + pushes + held > budget:
        largest = sorted(sizes, key=lambda digest: -sizes[digest])[:_MAX_NAMED]
        named = ", ".join(f"{uses[digest].name} {format_bytes(sizes[digest])}" for digest in largest)
        more = f" and {len(sizes) - _MAX_NAMED} more" if len(sizes) > _MAX_NAMED else ""
        beside = f"; pushes take {format_bytes(pushes)}, kept hidden states {format_bytes(held)}" if pushes else ""
        raise InvalidRequestError(
            "operators",
            f"take {format_bytes(sum(sizes.values()))} in a worker; this server keeps {format_bytes(budget)} for "
            f"operators (--operator-memory): {named}{more}{beside}",
        )
    return [use.artifact for use in uses.values()]


class OperatorCache:
    """The operators in the workers, by digest, the least recently used evicted first.

    They take at most what ``budget`` bytes leave beside the pushes of a step and what running jobs hold. At most
    ``max_kept`` of them, unless requests hold more.
    """

    def __init__(
        self,
        load: Load,
        unload: Unload,
        *,
        budget: int,
        pushes: Callable[[int], int] = lambda _layers: 0,
        max_kept: int = MAX_OPERATORS_KEPT,
    ) -> None:
        """``pushes``: bytes of a step's pushes, by the largest number of layers at which a request is pushed."""
        self._load, self._unload, self._budget, self._max_kept = load, unload, budget, max_kept
        self._pushes = pushes
        self._num_jobs: Counter[int] = Counter()
        """How many jobs reserved the pushes of so many layers."""
        self._held = 0
        """Bytes that running jobs hold beside operators."""
        self._sizes: OrderedDict[str, int] = OrderedDict()
        """Bytes of the operators that are loaded or being loaded, least recently used first."""
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._num_holders: Counter[str] = Counter()
        """How many requests reserved an operator."""
        self._reserved: dict[str, int] = {}
        """Bytes of the operators that have holders, loaded or not."""

    @property
    def num_bytes(self) -> int:
        """What the operators take in each worker."""
        return sum(self._sizes.values())

    def reserve(
        self, artifacts: Iterable[OperatorArtifact], memory: JobMemory = NO_MEMORY, *, retry_after: float
    ) -> None:
        """Reserves room for a job, and for its operators, each once, until it is released. Loads nothing.

        Raises :class:`QueueFullError` when others have reserved so much that not all of it fits.
        """
        requested = {artifact.digest: prepared_bytes(artifact) for artifact in artifacts}
        together = {**self._reserved, **requested}
        layers = max((memory.layers, *self._num_jobs))
        if sum(together.values()) + self._pushes(layers) + self._held + memory.held > self._budget:
            raise QueueFullError(
                f"the operators of running requests take {format_bytes(sum(self._reserved.values()))} of "
                f"{format_bytes(self._budget)}{self._taken_beside()}, and those of this one "
                f"{format_bytes(sum(requested.values()))}{self._more_beside(memory)}",
                retry_after,
            )
        self._reserved = together
        self._num_holders.update(requested.keys())
        self._num_jobs[memory.layers] += 1
        self._held += memory.held

    def release(self, artifacts: Iterable[OperatorArtifact], memory: JobMemory = NO_MEMORY) -> None:
        """Gives back what one :meth:`reserve` reserved. Raises :class:`ValueError` for operators without a holder."""
        digests = {artifact.digest for artifact in artifacts}
        if unheld := digests - self._num_holders.keys():
            raise ValueError(f"operators are released that nobody holds: {', '.join(sorted(unheld))}")
        self._num_holders.subtract(digests)
        # Drops the counts that are 0.
        self._num_holders += Counter()
        self._reserved = {digest: size for digest, size in self._reserved.items() if digest in self._num_holders}
        self._num_jobs[memory.layers] -= 1
        self._num_jobs += Counter()
        self._held -= memory.held

    @property
    def _room(self) -> int:
        """Bytes for operators, those that nobody uses included."""
        return self._budget - self._pushes(max(self._num_jobs, default=0)) - self._held

    def _taken_beside(self) -> str:
        pushes = self._pushes(max(self._num_jobs, default=0))
        return (
            f", with {format_bytes(pushes)} for pushes and {format_bytes(self._held)} for kept hidden states"
            if pushes or self._held
            else ""
        )

    def _more_beside(self, memory: JobMemory) -> str:
        pushes = self._pushes(memory.layers)
        return f", its pushes {format_bytes(pushes)}, its kept states {format_bytes(memory.held)}" if pushes else ""

    async def load(self, artifacts: Iterable[OperatorArtifact]) -> None:
        """Returns when all of them are in the workers, and what is kept beside them leaves room for what is reserved.

        The caller has reserved them, and they stay until released.
        """
        if evicted := self._evict(self.num_bytes - self._room, 0):
            await self._unload(evicted)
        for digest, artifact in {artifact.digest: artifact for artifact in artifacts}.items():
            if digest in self._sizes and digest not in self._loading:
                self._sizes.move_to_end(digest)
                continue
            if digest not in self._loading:
                task = self._loading[digest] = asyncio.create_task(self._load_one(digest, artifact))
                # Retrieves the exception, of which asyncio complains where every waiting request was cancelled.
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
            # Shielded: other requests may wait for the same load.
            await asyncio.shield(self._loading[digest])

    async def _load_one(self, digest: str, artifact: OperatorArtifact) -> None:
        try:
            await self._make_room(digest, prepared_bytes(artifact))
            await self._load(artifact)
        except BaseException:
            self._sizes.pop(digest, None)
            raise
        finally:
            del self._loading[digest]

    async def _make_room(self, digest: str, size: int) -> None:
        """Evicts until ``size`` bytes are free and counts them as the operator's.

        Raises :class:`asyncio.CancelledError` when the operator has lost its last holder meanwhile.
        """
        while digest in self._num_holders:
            evicted = self._evict(self.num_bytes + size - self._room, len(self._sizes) + 1 - self._max_kept)
            fits = self.num_bytes + size <= self._room
            if fits:
                self._sizes[digest] = size
            if evicted:
                await self._unload(evicted)
            if fits:
                return
            # All that is reserved fits, so what is in the way is being loaded for requests that were cancelled.
            abandoned = [
                task for other, task in self._loading.items() if other in self._sizes.keys() - self._num_holders
            ]
            await asyncio.wait(abandoned, return_when=asyncio.FIRST_COMPLETED)
        raise asyncio.CancelledError

    def _evict(self, missing: int, surplus: int) -> list[str]:
        """Forgets operators that nobody holds until so many bytes are free and so many are gone; the caller unloads."""
        evicted = list[str]()
        for other, taken in list(self._sizes.items()):
            if missing <= 0 and surplus <= len(evicted):
                break
            if other not in self._num_holders and other not in self._loading:
                del self._sizes[other]
                evicted.append(other)
                missing -= taken
        return evicted
