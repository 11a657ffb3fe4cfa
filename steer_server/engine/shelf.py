"""Which operators the workers hold: loaded before a request that needs them, kept while it runs, and for a while after.

Operators go by their digest, so that a name that stands for another file now leaves the requests alone that began with
the one before.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable

from operators.artifact import OperatorArtifact, to_bytes

Load = Callable[[str, bytes], Awaitable[int]]
"""Sends an operator to the workers; answers how many bytes it takes there."""
Unload = Callable[[list[str]], Awaitable[None]]


class OperatorShelf:
    """Operators in the workers, by digest; the least recently used go when ``budget`` bytes are passed."""

    def __init__(self, load: Load, unload: Unload, *, budget: int) -> None:
        self._load, self._unload, self._budget = load, unload, budget
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._held: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        """What the operators take in each worker."""
        return sum(self._sizes.values())

    async def hold(self, artifacts: Iterable[OperatorArtifact]) -> None:
        """Returns when all of them are loaded. Each stays until it is released as often as it was held."""
        wanted = {artifact.digest: artifact for artifact in artifacts}
        # Held first: what is being loaded for this request must not go to make room for that of another.
        self._held.update(wanted.keys())
        try:
            for digest, artifact in wanted.items():
                if digest in self._sizes:
                    self._sizes.move_to_end(digest)
                    continue
                if digest not in self._loading:
                    self._loading[digest] = asyncio.create_task(self._fetch(digest, artifact))
                # Another request may wait for the same one: this one's end does not stop it.
                await asyncio.shield(self._loading[digest])
            await self._trim()
        except BaseException:
            self.release(wanted)
            raise

    def release(self, digests: Iterable[str]) -> None:
        """Gives back what a request held."""
        self._held.subtract(set(digests))
        self._held += Counter()

    async def _fetch(self, digest: str, artifact: OperatorArtifact) -> None:
        try:
            self._sizes[digest] = await self._load(digest, await asyncio.to_thread(to_bytes, artifact))
        finally:
            del self._loading[digest]

    async def _trim(self) -> None:
        over, gone = self.num_bytes - self._budget, []
        for digest, size in list(self._sizes.items()):
            if over <= 0:
                break
            if not self._held[digest]:
                del self._sizes[digest]
                gone.append(digest)
                over -= size
        if gone:
            await self._unload(gone)
