"""Names of a store that work is under way for: two calibrations of one operator at once would undo each other.

Builds of files claim each operator too, so that several processes, on one machine or on many, share a file of concepts.

A claim is a lock on a hidden file of the store. The system releases it with the process that holds it, however that
ends; the file is removed where the work ends by itself, and is as good as none where it was left behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from operators.core.errors import StoreError
from operators.core.store import Store, check_name

_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_MAX_TOLD = 80
"""Characters of what a holder says about itself."""


@contextmanager
def claim(store: Store, name: str, work: str) -> Iterator[None]:
    """Keeps others from working on ``name`` while the block runs. ``work``: what is done, such as "calibration".

    Raises:
        StoreError: the name is not allowed; or something is under way for it already, here or in another process; or
            the store cannot be written to.
    """
    with claim_if_free(store, name, work) as holder:
        if holder is not None:
            raise in_use(store, name, holder)
        yield


def in_use(store: Store, name: str, holder: str) -> StoreError:
    """What is said where a name is claimed by ``holder``."""
    return StoreError(
        f"operator {name!r} in {store.path} is in use: {holder or 'other work'} is under way; wait for its end, or "
        "take another name"
    )


@contextmanager
def claim_if_free(store: Store, name: str, work: str) -> Iterator[str | None]:
    """Like :func:`claim`, and None in the block; where ``name`` is claimed, nothing is, and its holder's words are.

    They are empty where it has not said anything yet. Raises :class:`StoreError`, but not for a name in use.
    """
    path = store.path / f".{check_name(name)}.lock"
    try:
        store.path.mkdir(parents=True, exist_ok=True)
        held = _locked(path)
    except OSError as error:
        raise StoreError(f"operator {name!r}: {path} cannot be written: {error.strerror}") from error
    if isinstance(held, str):
        yield held
        return
    with os.fdopen(held, "w", encoding="utf-8") as file:
        try:
            file.write(f"{work} by process {os.getpid()}")
            file.flush()
            yield None
        finally:
            # While it is locked: nobody can have locked this file in the meantime.
            with suppress(OSError):
                path.unlink()


def _locked(path: Path) -> int | str:
    """A descriptor of the locked, empty file; what its holder says about itself where there is one."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                with os.fdopen(descriptor, "rb") as file:
                    return file.read(_MAX_TOLD).decode(errors="replace")
            # A file system without locks: nothing can be claimed, and nothing is refused.
        # Its last holder may have removed it before it was locked.
        if os.path.lexists(path) and os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            os.ftruncate(descriptor, 0)
            return descriptor
        os.close(descriptor)
