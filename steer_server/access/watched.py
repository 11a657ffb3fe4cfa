"""Files that are read again when they change, and what was made of them last.

They are compared by what is in them, so that a link that was moved to another directory, as Kubernetes renews secrets,
is a change like any other. New content counts once it has been there at two looks: a file that is being written, or a
key whose certificate has yet to come, is not taken, and nothing is said of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog

from steer_server.errors import StartupError

log = structlog.get_logger(__name__)

LOOK_SECONDS = 0.2
"""Between two looks: what was written is taken, and what it replaced is not, well within a second."""
_MAX_BYTES = 1 << 20

_T = TypeVar("_T")
_Contents = tuple[bytes, ...] | str
"""Of each file; or why one cannot be read."""


class Watched(Generic[_T]):
    """What files hold together. :attr:`value` may be read from any thread."""

    def __init__(self, what: str, paths: Sequence[Path], make: Callable[..., _T]) -> None:
        """``make``: given the bytes of each file; raises :class:`ValueError` where they cannot be used.

        Raises :class:`StartupError` where they cannot be used now.
        """
        self.what, self._paths, self._make = what, tuple(paths), make
        self._taken = self._seen = self._read()
        try:
            self.value = self._made(self._taken)
        except ValueError as error:
            raise StartupError(f"{what} {self._names()} cannot be used: {error}") from None
        self.problem = ""
        """Why what is in the files now is not what :attr:`value` is; empty where it is."""
        self.times_taken = 1

    def look(self) -> None:
        """Reads the files, and takes what is new in them and can be used; else keeps what there was."""
        contents = self._read()
        is_settled, self._seen = contents == self._seen, contents
        if not is_settled or contents == self._taken:
            if contents == self._taken:
                self.problem = ""
            return
        try:
            self.value = self._made(contents)
        except ValueError as error:
            if self.problem != str(error):
                self.problem = str(error)
                log.error("changed and not taken", file=self.what, path=self._names(), problem=self.problem)
            return
        self._taken, self.problem = contents, ""
        self.times_taken += 1
        log.info("changed and taken", file=self.what, path=self._names())

    def _made(self, contents: _Contents) -> _T:
        if isinstance(contents, str):
            raise ValueError(contents)
        return self._make(*contents)

    def _read(self) -> _Contents:
        try:
            return tuple(_content(path) for path in self._paths)
        except OSError as error:
            return f"{error.filename}: {error.strerror}"

    def _names(self) -> str:
        return ", ".join(map(str, self._paths))


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise OSError(0, f"has more than {_MAX_BYTES} bytes, the most that is read", str(path))
    return content


async def watch(files: Sequence[Watched[Any]], tick: Callable[[], None] = lambda: None) -> None:
    """Looks at all of them again and again, beside the event loop, and calls ``tick``. Runs until it is cancelled."""
    # A thread of its own for each: a token that was revoked is refused however many others wait for a thread, and where
    # the disk of a certificate hangs.
    threads = ThreadPoolExecutor(max(1, len(files)), thread_name_prefix="watch")
    looking: dict[Watched[Any], asyncio.Future[None]] = {}
    try:
        while files:
            await asyncio.sleep(LOOK_SECONDS)
            tick()
            for each in files:
                if each not in looking or looking[each].done():
                    looking[each] = asyncio.get_running_loop().run_in_executor(threads, each.look)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
