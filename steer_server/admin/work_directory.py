"""Directories of the store in which builds work. Each has a lock that its server holds, or else was left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

_PREFIX = ".build-"
_LOCK = "lock"


@contextmanager
def work_directory(store: Path) -> Iterator[Path]:
    """A new, empty directory within ``store``, so that what is made in it can be renamed into the store.

    It is removed on exit. Raises :class:`OSError`.
    """
    store.mkdir(parents=True, exist_ok=True)
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=store))
        try:
            # A server that starts just now may take it for one that was left behind, and be faster.
            with suppress(FileNotFoundError), open(path / _LOCK, "wb") as lock:
                # Where the file system has no locks, nobody takes it for abandoned either.
                if _lock(lock.fileno()) is not _Lock.ANOTHERS and path.exists():
                    inner = path / "work"
                    inner.mkdir()
                    yield inner
                    return
        finally:
            shutil.rmtree(path, ignore_errors=True)


def remove_abandoned(store: Path) -> None:
    """Removes the directories that no server holds. Raises :class:`OSError` for a store that cannot be read."""
    for path in store.glob(f"{_PREFIX}*"):
        with suppress(OSError), open(path / _LOCK, "ab") as lock:
            if _lock(lock.fileno()) is _Lock.OURS:
                shutil.rmtree(path, ignore_errors=True)


class _Lock(Enum):
    """Whose a file is."""

    OURS = "ours"
    ANOTHERS = "another's"
    UNKNOWN = "unknown"
    """The file system has no locks."""


def _lock(descriptor: int) -> _Lock:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Lock.ANOTHERS
    except OSError:
        return _Lock.UNKNOWN
    return _Lock.OURS if os.fstat(descriptor).st_nlink > 0 else _Lock.ANOTHERS
