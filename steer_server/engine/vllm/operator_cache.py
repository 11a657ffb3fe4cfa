"""Which operators the workers hold: loaded before a request that needs them, kept while it runs, then until evicted.

Operators are known by their digest, so replacing the file behind a name leaves requests alone that began with the old
one. A job begins when there is room for all that it needs, so what the workers hold never exceeds the budget.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable

from operators.core.apply import prepared_bytes
from operators.core.artifact import OperatorArtifact
from operators.core.capacity import format_bytes
from steer_server.engine.vllm.operator_room import OperatorRoom
from steer_server.errors import InvalidRequestError, OperatorUnusableError
from steer_server.types import DecodeJob

Load = Callable[[OperatorArtifact], Awaitable[None]]
"""Loads an operator into all workers. If it fails, no worker keeps any part of it."""
Unload = Callable[[list[str]], Awaitable[None]]
"""Removes operators from all workers, by digest."""
MAX_OPERATORS_KEPT = 4096
"""What is kept beyond the operators that running requests hold: words make many small ones, each with a cost beside its
numbers."""
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

    They take at most what ``room`` leaves beside the pushes of a step and what running jobs hold. At most ``max_kept``
    of them, unless requests hold more. Who loads some has added them to the room.
    """

    def __init__(self, load: Load, unload: Unload, room: OperatorRoom, *, max_kept: int = MAX_OPERATORS_KEPT) -> None:
        self._load, self._unload, self._max_kept = load, unload, max_kept
        self.room = room
        """Of the jobs that run."""
        self._sizes: OrderedDict[str, int] = OrderedDict()
        """Bytes of the operators that are loaded or being loaded, least recently used first."""
        self._loading: dict[str, asyncio.Task[None]] = {}

    @property
    def num_bytes(self) -> int:
        """What the operators take in each worker. Any thread may ask."""
        return sum(tuple(self._sizes.values()))

    async def load(self, artifacts: Iterable[OperatorArtifact]) -> None:
        """Returns when all of them are in the workers, and what is kept beside them leaves room for what is reserved.

        They stay for as long as the room has a job that needs them.
        """
        if evicted := self._evict(self.num_bytes - self.room.left, 0):
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
        while digest in self.room:
            evicted = self._evict(self.num_bytes + size - self.room.left, len(self._sizes) + 1 - self._max_kept)
            fits = self.num_bytes + size <= self.room.left
            if fits:
                self._sizes[digest] = size
            if evicted:
                await self._unload(evicted)
            if fits:
                return
            # All that is reserved fits, so what is in the way is being loaded for requests that were cancelled.
            abandoned = [
                task for other, task in self._loading.items() if other in self._sizes and other not in self.room
            ]
            await asyncio.wait(abandoned, return_when=asyncio.FIRST_COMPLETED)
        raise asyncio.CancelledError

    def _evict(self, missing: int, surplus: int) -> list[str]:
        """Forgets operators that nobody holds until so many bytes are free and so many are gone; the caller unloads."""
        evicted = list[str]()
        for other, taken in list(self._sizes.items()):
            if missing <= 0 and surplus <= len(evicted):
                break
            if other not in self.room and other not in self._loading:
                del self._sizes[other]
                evicted.append(other)
                missing -= taken
        return evicted
