"""Directories of the store in which builds work. Each has a lock that its server holds, or else was left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from pathlib import Path

_PREFIX = ".build-"
_LOCK = "lock"
_TRIES = 100
"""Each fails only where another server takes the directory that was just made."""


@contextmanager
def work_directory(store: Path) -> Iterator[Path]:
    """A new, empty directory within ``store``, so that what is made in it can be renamed into the store.

    It is removed on exit. Raises :class:`OSError`.
    """
    store.mkdir(parents=True, exist_ok=True)
    for _ in range(_TRIES):
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=store))
        # A server that starts just now may take it for one that was left behind, and be faster.
        with ExitStack() as made, suppress(FileNotFoundError):
            made.callback(shutil.rmtree, path, ignore_errors=True)
            lock = made.enter_context(open(path / _LOCK, "wb"))
            # Where the file system has no locks, nobody takes it for abandoned either.
            if _lock(lock.fileno()) is not _Lock.ANOTHERS and path.exists():
                inner = path / "work"
                inner.mkdir()
                kept = made.pop_all()
                break
    else:
        raise OSError(errno.EAGAIN, f"{_TRIES} new directories were taken away at once", str(store))
    with kept:
        yield inner


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
