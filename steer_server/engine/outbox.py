"""What a job has decoded and its reader has not taken yet: kept within bounds of memory and time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from steer_server.errors import SlowReaderError, SteerServerError
from steer_server.types import EngineEvent, RowFinished, Score, TokenEvent

MAX_BYTES = 4 << 20
"""That a reader may be behind before its job pauses, where the engine can do that."""
PATIENCE = 5.0
"""Seconds without reading after which a reader that is so far behind is given up."""
_EVENT_BYTES = 400
_ALTERNATIVE_BYTES = 180
"""In memory, as tracemalloc counts them."""
Message = EngineEvent | SteerServerError | None
"""An event, the job's error, or None for the end."""


class Outbox:
    """The messages of one job to one reader, in order. Belongs to an event loop."""

    def __init__(
        self,
        give_up: Callable[[], None],
        caught_up: Callable[[], None] = lambda: None,
        *,
        max_bytes: int = MAX_BYTES,
        patience: float = PATIENCE,
    ) -> None:
        """``give_up``: ends the job of a reader that does not read. ``caught_up``: called when it is no more behind."""
        self._give_up, self._caught_up = give_up, caught_up
        self._max_bytes, self._patience = max_bytes, patience
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._held, self._num_read = 0, 0
        self._check: asyncio.TimerHandle | None = None
        self._is_closed = False
        self.is_behind = False
        """Whether the reader has so much to read that nothing more should be decoded for it. Any thread may ask."""

    def put(self, message: Message) -> None:
        """Adds a message; nothing where nobody reads any more."""
        if self._is_closed:
            return
        self._messages.put_nowait(message)
        self._held += _size(message)
        if self._held > self._max_bytes and not self.is_behind:
            self.is_behind = True
            self._check_later()

    async def get(self) -> Message:
        """The next message. :class:`SlowReaderError` takes the place of those that were kept too long."""
        if not self._messages.empty():
            # Everybody else's turn, however much there is to read.
            await asyncio.sleep(0)
        message = await self._messages.get()
        self._num_read += 1
        self._held -= _size(message)
        if self.is_behind and self._held < self._max_bytes // 2:
            self.is_behind = False
            self._caught_up()
        return message

    def close(self) -> None:
        """Drops what is left: nobody reads any more."""
        self._is_closed, self.is_behind, self._held = True, False, 0
        while not self._messages.empty():
            self._messages.get_nowait()
        if self._check is not None:
            self._check.cancel()

    def _check_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._check = loop.call_later(self._patience, self._check_reader, self._num_read)

    def _check_reader(self, num_read: int) -> None:
        if not self.is_behind:
            return
        if self._num_read > num_read:
            self._check_later()
            return
        self.close()
        self._messages.put_nowait(SlowReaderError(self._patience))
        self._give_up()


def _size(message: Message) -> int:
    alternatives, scores = 0, tuple[Score, ...]()
    if isinstance(message, TokenEvent):
        alternatives = 0 if message.logprob is None else len(message.logprob.top)
        scores = () if message.score is None else (message.score,)
    elif isinstance(message, RowFinished):
        scores = message.scores
    alternatives += sum(len(each.gained) + len(each.lost) + len(each.words) for each in scores)
    return _EVENT_BYTES + _ALTERNATIVE_BYTES * alternatives
