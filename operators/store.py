"""A directory of operators: one ``NAME.safetensors`` each.

Writing is atomic: a file appears whole or not at all. Names cannot leave the directory.
"""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from operators.artifact import MAX_BYTES, OperatorArtifact, read_artifact, to_bytes
from operators.errors import StoreError

SUFFIX = ".safetensors"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


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
    """Where ``name`` may be written. Raises :class:`StoreError`: not allowed, or taken without ``replace``."""
    path = path_of(store, name)
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
        handle, temporary = tempfile.mkstemp(dir=store, prefix=f".{name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(to_bytes(artifact))
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            # Interrupted (Ctrl-C included) or out of space: leave no half-written file behind, and let
            # nothing hide the reason.
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise StoreError(f"operator {name!r} cannot be written to {store}: {error.strerror}") from error
    return path


def delete(store: Path, name: str) -> None:
    """Removes an operator. Raises :class:`StoreError` when it is not there."""
    path = path_of(store, name)
    try:
        path.unlink()
    except FileNotFoundError:
        raise StoreError(f"no operator {name!r} in {store}; there are: {', '.join(names(store)) or 'none'}") from None
    except OSError as error:
        raise StoreError(f"operator {name!r} cannot be deleted: {error.strerror}") from error
