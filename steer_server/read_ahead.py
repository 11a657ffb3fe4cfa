"""What a job has decoded and its client has not taken yet: kept within bounds of memory and time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable

from steer_server.errors import SlowReaderError
from steer_server.types import EngineEvent, TokenEvent

MAX_BYTES = 16 << 20
"""That a client may be behind; more only for as long as it goes on reading."""
PATIENCE = 5.0
"""Seconds without reading after which a client that is so far behind is given up."""
_EVENT_BYTES = 400
_ALTERNATIVE_BYTES = 180
"""In memory, as tracemalloc counts them."""


async def read_ahead(
    events: AsyncIterable[EngineEvent],
    cancel: Callable[[], None],
    *,
    max_bytes: int = MAX_BYTES,
    patience: float = PATIENCE,
) -> AsyncGenerator[EngineEvent, None]:
    """The events, taken from the engine as they come.

    Raises :class:`SlowReaderError`, after ``cancel``, for a reader that is more than ``max_bytes`` behind and has taken
    nothing for ``patience`` seconds; what it was to get is dropped at once.
    """
    queue: asyncio.Queue[EngineEvent | Exception | None] = asyncio.Queue()
    held, waits, taken = 0, True, time.monotonic()

    async def fill() -> None:
        nonlocal held
        try:
            async for event in events:
                queue.put_nowait(event)
                held += _size(event)
                if held > max_bytes and not waits and time.monotonic() - taken > patience:
                    cancel()
                    raise SlowReaderError(patience)
                # The reader's turn, and that of everybody else.
                await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 - handed on to the reader
            if isinstance(error, SlowReaderError):
                while not queue.empty():
                    queue.get_nowait()
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    filling = asyncio.ensure_future(fill())
    try:
        while (event := await queue.get()) is not None:
            waits, taken = False, time.monotonic()
            if isinstance(event, Exception):
                raise event
            held -= _size(event)
            yield event
            waits = True
    finally:
        filling.cancel()


def _size(event: EngineEvent) -> int:
    size = _EVENT_BYTES
    if isinstance(event, TokenEvent) and event.logprob is not None:
        size += _ALTERNATIVE_BYTES * len(event.logprob.top)
    if isinstance(event, TokenEvent) and event.score is not None:
        size += _ALTERNATIVE_BYTES * (len(event.score.gained) + len(event.score.lost) + len(event.score.words))
    return size
