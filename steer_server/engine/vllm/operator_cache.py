"""Which operators the workers hold: loaded before a request that needs them, kept while it runs, and for a while after.

Operators go by their digest, so that a name that stands for another file now leaves the requests alone that began with
the one before. Room is reserved before anything is loaded: what the workers hold never passes the budget.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable

from operators.core.apply import prepared_bytes
from operators.core.artifact import OperatorArtifact
from operators.core.capacity import in_words
from steer_server.errors import InvalidRequestError, OperatorUnusableError, QueueFullError
from steer_server.types import DecodeJob

Load = Callable[[OperatorArtifact], Awaitable[None]]
"""Brings an operator to the workers; what is there of one that fails on the way goes."""
Unload = Callable[[list[str]], Awaitable[None]]
_NAMED = 4


def needed(job: DecodeJob, *, budget: int) -> list[OperatorArtifact]:
    """The operators that the workers must have for a job, each once.

    Raises:
        OperatorUnusableError: one takes more than ``budget`` bytes alone.
        InvalidRequestError: they do together.
    """
    plans = [row.plan for row in job.rows if row.plan is not None]
    uses = {use.artifact.digest: use for plan in plans for use in plan.applications if use.setting.strength}
    sizes = {digest: prepared_bytes(use.artifact) for digest, use in uses.items()}
    for digest, size in sizes.items():
        if size > budget:
            raise OperatorUnusableError(
                uses[digest].name,
                f"it takes {in_words(size)} in a worker; this server keeps {in_words(budget)} for operators "
                "(--operator-memory)",
            )
    if sum(sizes.values()) > budget:
        largest = sorted(sizes, key=lambda digest: -sizes[digest])[:_NAMED]
        parts = ", ".join(f"{uses[digest].name} {in_words(sizes[digest])}" for digest in largest)
        more = f" and {len(sizes) - _NAMED} more" if len(sizes) > _NAMED else ""
        raise InvalidRequestError(
            "operators",
            f"take {in_words(sum(sizes.values()))} in a worker; this server keeps {in_words(budget)} for operators "
            f"(--operator-memory): {parts}{more}",
        )
    return [use.artifact for use in uses.values()]


class OperatorShelf:
    """Operators in the workers, by digest; the least recently used go when room is needed within ``budget`` bytes."""

    def __init__(self, load: Load, unload: Unload, *, budget: int) -> None:
        self._load, self._unload, self._budget = load, unload, budget
        self._sizes: OrderedDict[str, int] = OrderedDict()
        """Of what is there or on its way."""
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._holders: Counter[str] = Counter()
        self._reserved: dict[str, int] = {}
        """Sizes of what is held, there or not."""

    @property
    def num_bytes(self) -> int:
        """What the operators take in each worker."""
        return sum(self._sizes.values())

    def reserve(self, artifacts: Iterable[OperatorArtifact], *, retry_after: float) -> None:
        """Holds the room of some operators, each once, until it is released; they may have to be loaded still.

        Raises :class:`QueueFullError` when others hold so much that there is no room for all of them.
        """
        wanted = {artifact.digest: prepared_bytes(artifact) for artifact in artifacts}
        together = {**self._reserved, **wanted}
        if sum(together.values()) > self._budget:
            raise QueueFullError(
                f"the operators of running requests take {in_words(sum(self._reserved.values()))} of "
                f"{in_words(self._budget)}, and those of this one {in_words(sum(wanted.values()))}",
                retry_after,
            )
        self._reserved = together
        self._holders.update(wanted.keys())

    def release(self, artifacts: Iterable[OperatorArtifact]) -> None:
        """Gives back what :meth:`reserve` held, once. Raises :class:`ValueError` for what nobody holds."""
        digests = {artifact.digest for artifact in artifacts}
        if loose := digests - self._holders.keys():
            raise ValueError(f"operators are released that nobody holds: {', '.join(sorted(loose))}")
        self._holders.subtract(digests)
        self._holders += Counter()
        self._reserved = {digest: size for digest, size in self._reserved.items() if digest in self._holders}

    async def load(self, artifacts: Iterable[OperatorArtifact]) -> None:
        """Returns when all of them are in the workers. They are reserved by the caller, and stay until released."""
        for digest, artifact in {artifact.digest: artifact for artifact in artifacts}.items():
            if digest in self._sizes and digest not in self._loading:
                self._sizes.move_to_end(digest)
                continue
            if digest not in self._loading:
                task = self._loading[digest] = asyncio.create_task(self._fetch(digest, artifact))
                # One that everybody has given up may fail unheard.
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
            # Another request may wait for the same one: this one's end does not stop it.
            await asyncio.shield(self._loading[digest])

    async def _fetch(self, digest: str, artifact: OperatorArtifact) -> None:
        try:
            await self._make_room(digest, prepared_bytes(artifact))
            await self._load(artifact)
        except BaseException:
            self._sizes.pop(digest, None)
            raise
        finally:
            del self._loading[digest]

    async def _make_room(self, digest: str, size: int) -> None:
        while digest in self._holders:
            over, gone = self.num_bytes + size - self._budget, []
            for other, taken in list(self._sizes.items()):
                if over <= 0:
                    break
                if other not in self._holders and other not in self._loading:
                    del self._sizes[other]
                    gone.append(other)
                    over -= taken
            if over <= 0:
                self._sizes[digest] = size
            if gone:
                await self._unload(gone)
            if over <= 0:
                return
            # What is reserved fits. The rest is on its way for requests that have given up.
            given_up = [task for other, task in self._loading.items() if other in self._sizes.keys() - self._holders]
            await asyncio.wait(given_up, return_when=asyncio.FIRST_COMPLETED)
        # So have all who wanted this one.
        raise asyncio.CancelledError
