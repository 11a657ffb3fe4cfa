"""How many connections a server has room for, and a warning before there is none."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

_OTHER_FILES = 256
"""Files that the process has open beside connections: weights, operators, pipes to workers."""
_NEAR = 0.9
_ESTABLISHED = "01"
_TABLES = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))


def room_for_connections(wanted: int, *, doors: int = 1) -> int:
    """How many connections each door may have open at once: ``wanted``, or fewer where the limit of files is lower.

    Raises the process's own limit as far as it may.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = doors * wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < needed:
            room = max(1, max(soft - _OTHER_FILES, soft // 2) // doors)
            log.warning("few files may be open", files=soft, max_connections=room)
            return min(wanted, room)
    return wanted


def count_connections(port: int) -> int:
    """Connections to a TCP port of this machine; 0 where the system does not tell."""
    count, local = 0, f":{port:04X}"
    for table in _TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        columns = (line.split(None, 4) for line in lines)
        count += sum(each[1].endswith(local) and each[3] == _ESTABLISHED for each in columns)
    return count


async def watch_connections(
    count: Callable[[], int], most: int, *, every: float = 2.0, show: Callable[[int], None] = lambda _: None
) -> None:
    """Shows how many are open, and warns, once each time, when it is nearly as many as may be. Runs until cancelled."""
    warned = False
    while True:
        found = await asyncio.to_thread(count)
        show(found)
        is_near = found >= _NEAR * most
        if is_near and not warned:
            log.warning("nearly all connections are taken", connections=found, max_connections=most)
        warned = is_near
        await asyncio.sleep(every)
