"""A directory of operators: one ``NAME.safetensors`` each.

Writing is atomic: a file appears whole or not at all. Names cannot leave the directory. A writer holds a lock on its
temporary file; one without a lock is what a killed writer left behind, and the next save removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from operators.core.artifact import MAX_BYTES, OperatorArtifact, read_artifact, to_bytes
from operators.core.errors import StoreError

SUFFIX = ".safetensors"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_TEMPORARY = re.compile(r"\.[a-z0-9][a-z0-9_.-]{0,63}\.[0-9a-f]{16}\.tmp")


def default_store() -> Path:
    """``$STEER_STORE``, or the user's data directory."""
    from platformdirs import user_data_path

    given = os.environ.get("STEER_STORE")
    return Path(given) if given else user_data_path("steering-operators") / "store"


def check_name(name: str) -> str:
    """The name itself, if it is allowed. Raises :class:`StoreError`."""
    if not _NAME.fullmatch(name):
        raise StoreError(
            f"operator name {name!r} is not allowed; 1 to 64 of a-z 0-9 _ . - are, beginning with a letter or digit"
        )
    return name


def path_of(store: Path, name: str) -> Path:
    """Where the operator ``name`` lives. Raises :class:`StoreError` for a name that is not allowed."""
    return store / (check_name(name) + SUFFIX)


def names(store: Path) -> list[str]:
    """Every name in the store, sorted, whether or not its file is valid. A store not made yet is empty."""
    if not store.exists():
        return []
    if not store.is_dir():
        raise StoreError(f"store {store} is not a directory")
    try:
        files = os.listdir(store)
    except OSError as error:
        raise StoreError(f"store {store} cannot be read: {error.strerror}") from error
    stems = (file.removesuffix(SUFFIX) for file in files if file.endswith(SUFFIX))
    return sorted(stem for stem in stems if _NAME.fullmatch(stem))


def load(store: Path, name: str, *, max_bytes: int = MAX_BYTES) -> OperatorArtifact:
    """Reads and verifies one operator.

    Raises:
        StoreError: no such operator; lists those there are.
        ArtifactError: its file is not valid.
    """
    path = path_of(store, name)
    if not os.path.lexists(path):
        raise StoreError(f"no operator {name!r} in {store}; there are: {', '.join(names(store)) or 'none'}")
    return read_artifact(path, max_bytes=max_bytes)


def check_free(store: Path, name: str, *, replace: bool = False) -> Path:
    """Where ``name`` may be written.

    Raises:
        StoreError: the name is not allowed, or taken without ``replace``, or the store cannot be written to.
    """
    path = path_of(store, name)
    # What is there of a store that is yet to be made.
    place = next((place for place in (store, *store.absolute().parents) if os.path.exists(place)), store)
    if not os.path.isdir(place):
        raise StoreError(f"operator {name!r} cannot be written to {store}: {place} is not a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise StoreError(f"operator {name!r} cannot be written to {store}: no permission to write to {place}")
    if not replace and os.path.lexists(path):
        raise StoreError(f"operator {name!r} is already in {store}; delete it, or replace it (--replace)")
    return path


def save(store: Path, name: str, artifact: OperatorArtifact, *, replace: bool = False) -> Path:
    """Writes an operator atomically and returns its path.

    Raises:
        StoreError: the name is taken and ``replace`` is false, or the file cannot be written. The store is as
            before.
    """
    path = check_free(store, name, replace=replace)
    try:
        store.mkdir(parents=True, exist_ok=True)
        _sweep(store)
        with _temporary(store, name) as file:
            file.write(to_bytes(artifact))
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
    except OSError as error:
        raise StoreError(f"operator {name!r} cannot be written to {store}: {error.strerror}") from error
    return path


@contextmanager
def _temporary(store: Path, name: str) -> Iterator[BinaryIO]:
    """A new file, locked; it is gone afterwards unless it was given another name."""
    while True:
        # Named before it is made, so that an interrupt at any moment knows what to remove.
        path = store / f".{name}.{secrets.token_hex(8)}.tmp"
        try:
            with open(path, "xb") as file:
                # A file system without locks has no sweeping either.
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                # Another writer may have swept it before it was locked.
                if os.path.lexists(path):
                    yield file
                    return
        finally:
            # Nothing hides the reason why it is left behind.
            with suppress(OSError):
                os.unlink(path)


def _sweep(store: Path) -> None:
    """Removes temporary files that nobody holds a lock on any more."""
    for left in filter(_TEMPORARY.fullmatch, os.listdir(store)):
        # Somebody else's, gone meanwhile, or being written: then it stays.
        with suppress(OSError), open(store / left, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(store / left)


def delete(store: Path, name: str) -> None:
    """Removes an operator. Raises :class:`StoreError` when it is not there."""
    path = path_of(store, name)
    try:
        path.unlink()
    except FileNotFoundError:
        raise StoreError(f"no operator {name!r} in {store}; there are: {', '.join(names(store)) or 'none'}") from None
    except OSError as error:
        raise StoreError(f"operator {name!r} cannot be deleted: {error.strerror}") from error
