"""Work in threads, which nothing can interrupt: whoever waits for it is cancelled only when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

_T = TypeVar("_T")


async def until_done(work: asyncio.Future[Any]) -> bool:
    """Waits for the end of some work, however that ends. Whether the caller was cancelled meanwhile."""
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


async def to_its_end(function: Callable[[], _T]) -> _T:
    """What a function returns that runs in a thread. Where the caller is cancelled, it waits for the end first."""
    running = asyncio.ensure_future(asyncio.to_thread(function))
    if await until_done(running):
        with suppress(Exception):
            running.result()
        raise asyncio.CancelledError
    return running.result()
