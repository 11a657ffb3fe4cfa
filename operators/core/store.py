"""A directory of operators: one ``NAME.safetensors`` each.

Writing is atomic: a file appears whole or not at all. Names cannot leave the directory. A writer holds a lock on its
temporary file; a temporary file without a lock was left behind by a killed writer, and the next save removes it.
Listing and deleting need no torch: it is imported where tensors are read or written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from operators.core.errors import ArtifactError, NameTakenError, OtherVersionError, StoreError
from operators.core.file_format import MAX_BYTES, FileHeader, read_file_header

if TYPE_CHECKING:
    from operators.core.artifact import OperatorArtifact

SUFFIX = ".safetensors"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_TEMPORARY = re.compile(r"\.[a-z0-9][a-z0-9_.-]{0,63}\.[0-9a-f]{16}\.tmp")
_UNLOADED = ".{}.unloaded"
"""A file that is there while servers of the store leave the operator of that name out of service."""


def check_name(name: str) -> str:
    """Returns the name unchanged. Raises :class:`StoreError` for one that is not allowed."""
    if not _NAME.fullmatch(name):
        raise StoreError(
            f"operator name {name!r} is not allowed; 1 to 64 of a-z 0-9 _ . - are, beginning with a letter or digit"
        )
    return name


class Store:
    """A directory of operators, each under its name. The directory is created by the first :meth:`save`.

    ``for name in store`` iterates over the names, and ``name in store`` says whether an operator has that name,
    whether or not its file is valid. Two stores are equal when their paths are.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def default(cls) -> Store:
        """The store at ``$STEER_STORE``, or the one in the user's data directory."""
        from platformdirs import user_data_path

        configured = os.environ.get("STEER_STORE")
        return cls(configured or user_data_path("steering-operators") / "store")

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def __eq__(self, other: object) -> bool:
        return self.path == other.path if isinstance(other, Store) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.path)

    # No __len__: an empty store would be false, and `store or Store.default()` another one.
    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(_NAME.fullmatch(name)) and os.path.lexists(self.path_of(name))

    def names(self) -> list[str]:
        """Every name in the store, sorted, whether or not its file is valid.

        A directory that does not exist yet is an empty store. Raises :class:`StoreError` when it cannot be read.
        """
        if not self.path.exists():
            return []
        if not self.path.is_dir():
            raise StoreError(f"store {self.path} is not a directory")
        try:
            files = os.listdir(self.path)
        except OSError as error:
            raise StoreError(f"store {self.path} cannot be read: {error.strerror}") from error
        stems = (file.removesuffix(SUFFIX) for file in files if file.endswith(SUFFIX))
        return sorted(stem for stem in stems if _NAME.fullmatch(stem))

    def path_of(self, name: str) -> Path:
        """The file of the operator ``name``, existing or not. Raises :class:`StoreError` for a name not allowed."""
        return self.path / (check_name(name) + SUFFIX)

    def load(self, name: str, *, max_bytes: int = MAX_BYTES) -> OperatorArtifact:
        """Reads and verifies one operator. ``max_bytes``: larger files are refused.

        Raises:
            StoreError: no such operator; the message lists those that exist.
            ArtifactError: its file is not valid.
        """
        from operators.core.artifact import read_artifact

        return read_artifact(self._existing(name), max_bytes=max_bytes)

    def read_header(self, name: str, *, max_bytes: int = MAX_BYTES) -> FileHeader:
        """Reads what one operator's file says about itself. No tensor is read or verified, and torch is not imported.

        Raises:
            StoreError: no such operator; the message lists those that exist.
            ArtifactError: the header, or the layout of the file, is not valid.
        """
        return read_file_header(self._existing(name), max_bytes=max_bytes)

    def check_free(self, name: str, *, replace: bool = False) -> Path:
        """The file that :meth:`save` would write for ``name``.

        Raises:
            StoreError: the name is not allowed, or taken without ``replace``, or the store cannot be written to.
        """
        path = self.path_of(name)
        # The store, or the nearest existing directory that it would be created in.
        parent = next(
            (place for place in (self.path, *self.path.absolute().parents) if os.path.exists(place)), self.path
        )
        if not os.path.isdir(parent):
            raise StoreError(f"operator {name!r} cannot be written to {self.path}: {parent} is not a directory")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise StoreError(f"operator {name!r} cannot be written to {self.path}: no permission to write to {parent}")
        if not replace and os.path.lexists(path):
            raise self._taken(name)
        return path

    def save(
        self, name: str, artifact: OperatorArtifact, *, replace: bool = False, instead_of: str | None = None
    ) -> Path:
        """Writes an operator atomically and returns its path.

        Args:
            instead_of: the digest of what this one was made from, the only one that it replaces; None for any.

        Raises:
            ArtifactError: it is not what was signed, so that no reader would accept its file.
            StoreError: the name is not allowed, or taken and ``replace`` is false, or by another than ``instead_of``,
                or the file cannot be written. The store is then unchanged.
        """
        from operators.core.artifact import assemble, tensors_of, to_bytes

        self.check_free(name, replace=replace or instead_of is not None)
        # A reader's own check: a part of it may have been replaced since.
        read = assemble(artifact.header_json, tensors_of(artifact), digest=artifact.digest, source=name)
        if read.header != artifact.header:
            raise ArtifactError(f"{name}: its header is not the one that was signed (with_header signs another)")
        try:
            with self.new_file(name) as file:
                file.write(to_bytes(artifact))
                return self.place(file, name, replace=replace, instead_of=instead_of)
        except OSError as error:
            raise StoreError(f"operator {name!r} cannot be written to {self.path}: {error.strerror}") from error

    @contextmanager
    def new_file(self, name: str) -> Iterator[BinaryIO]:
        """An empty file for :meth:`place`, which no reader sees; removed on exit unless it was placed.

        A file that a killed writer left is removed, too. Raises :class:`OSError`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.remove_abandoned()
        with temporary_file(self.path, check_name(name)) as file:
            yield file

    def place(self, file: BinaryIO, name: str, *, replace: bool = False, instead_of: str | None = None) -> Path:
        """Gives what was written to a :meth:`new_file` its name, and returns its path. See :meth:`save`.

        Raises :class:`StoreError`, and :class:`OSError` where the file cannot be written to the disk.
        """
        path = self.path_of(name)
        file.flush()
        os.fsync(file.fileno())
        os.chmod(file.name, 0o644)
        if instead_of is not None and (now := self.read_header(name).digest) != instead_of:
            raise OtherVersionError(
                f"operator {name!r} is not stored: it was made from {instead_of}, and {self.path} has {now} "
                "under this name by now",
                found=now,
            )
        try:
            _put(file.name, path, replace=replace or instead_of is not None)
        except FileExistsError:
            # Another writer was faster.
            raise self._taken(name) from None
        return path

    def remove_abandoned(self) -> None:
        """Removes what killed writers left. Raises :class:`OSError` for a store that cannot be read."""
        _remove_abandoned(self.path)

    def is_unloaded(self, name: str) -> bool:
        """Whether servers are to leave it out of service."""
        return os.path.lexists(self._unloaded_mark(name))

    def set_unloaded(self, name: str, unloaded: bool) -> None:
        """Says to every server of this store, from its next reading on, whether to leave an operator out of service.

        Raises :class:`StoreError` where that cannot be written, or there is no such operator.
        """
        self._existing(name)
        mark = self._unloaded_mark(name)
        try:
            if unloaded:
                mark.touch()
            else:
                mark.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{mark} cannot be written: {error.strerror}") from error

    def _unloaded_mark(self, name: str) -> Path:
        return self.path / _UNLOADED.format(check_name(name))

    def delete(self, name: str) -> None:
        """Removes an operator. Raises :class:`StoreError` when it does not exist or cannot be removed."""
        path = self.path_of(name)
        try:
            path.unlink()
            self._unloaded_mark(name).unlink(missing_ok=True)
        except FileNotFoundError:
            raise self._missing(name) from None
        except OSError as error:
            raise StoreError(f"operator {name!r} cannot be deleted: {error.strerror}") from error

    def _taken(self, name: str) -> StoreError:
        return NameTakenError(
            f"operator {name!r} is already in {self.path}; delete it, or replace it (--replace; Python: replace=True)"
        )

    def _existing(self, name: str) -> Path:
        path = self.path_of(name)
        if not os.path.lexists(path):
            raise self._missing(name)
        return path

    def _missing(self, name: str) -> StoreError:
        return StoreError(f"no operator {name!r} in {self.path}; there are: {', '.join(self.names()) or 'none'}")


def _put(temporary: str, path: Path, *, replace: bool) -> None:
    """Gives a finished file its name. Raises :class:`FileExistsError` where it is taken and ``replace`` is false."""
    if not replace:
        try:
            # Of writers of one name at once, exactly one makes the link; a rename would succeed for each of them.
            os.link(temporary, path)
            return
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                raise
            # A file system without links: the check beforehand is all that there is.
    os.replace(temporary, path)


@contextmanager
def temporary_file(directory: Path, name: str) -> Iterator[BinaryIO]:
    """A new, locked file in ``directory``; removed on exit unless it was renamed."""
    while True:
        # The path is chosen before the file is made, so that an interrupt at any moment knows what to remove.
        path = directory / f".{name}.{secrets.token_hex(8)}.tmp"
        try:
            with open(path, "xb") as file:
                # On a file system without locks, abandoned files are not removed either.
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                # Another writer may have removed it before it was locked.
                if os.path.lexists(path):
                    yield file
                    return
        finally:
            # An error here must not hide the one that left the file behind.
            with suppress(OSError):
                os.unlink(path)


def _remove_abandoned(directory: Path) -> None:
    """Removes temporary files that no process holds a lock on any more."""
    for file_name in filter(_TEMPORARY.fullmatch, os.listdir(directory)):
        # Not ours, removed meanwhile, or being written: then it stays.
        with suppress(OSError), open(directory / file_name, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(directory / file_name)
