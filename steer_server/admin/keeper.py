"""Changes of the store, each of which the registry takes over at once: none is half made, and no two are mixed up."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from operators.core.errors import ArtifactError, NameTakenError, OtherVersionError, StoreError
from operators.core.store import Store, check_name
from steer_server.errors import (
    InvalidRequestError,
    OperatorChangedError,
    OperatorExistsError,
    OperatorUnusableError,
    StoreFullError,
    StoreUnwritableError,
    UnknownOperatorError,
)
from steer_server.registry import OperatorEntry, Registry, check_granted
from steer_server.types import ANY

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_PROBLEM = 1024
"""Characters of what is wrong with a file: a hostile one chooses parts of the message."""


class Keeper:
    """A store and the registry that serves it. Its methods read and write files: call them beside the event loop."""

    def __init__(self, store: Store, registry: Registry, *, max_served: int) -> None:
        """``max_served``: bytes of all operators in service; none comes into service beyond them."""
        self.store, self._registry, self._max_served = store, registry, max_served
        self._one_at_a_time = threading.Lock()

    def check(self, name: str, replace: str, *, field: str = "") -> None:
        """Refuses what :meth:`place` would refuse by now, before anything is sent or built for it.

        Args:
            field: of the request, in which ``name`` and ``replace`` are.

        Raises:
            InvalidRequestError: the name is not allowed, or ``replace`` is neither empty, a digest nor "any".
            PermissionDeniedError: the caller may use other operators alone. So do all methods here.
            UnknownOperatorError: it is to replace a version of what is not there.
            OperatorExistsError, OperatorChangedError: the store has one of that name that it may not replace.
        """
        self._check_name(name, field)
        if replace not in ("", ANY) and not _DIGEST.fullmatch(replace):
            problem = f"is {replace[:80]!r}; accepted: nothing, {ANY!r}, or sha256: and all 64 digits of a digest"
            raise InvalidRequestError(f"{field}replace", problem)
        if name not in self.store:
            if replace not in ("", ANY):
                raise self._unknown(name)
            return
        if replace == "":
            raise OperatorExistsError(name, self._digest(name))
        if replace != ANY and (found := self._digest(name)) != replace:
            raise OperatorChangedError(name, expected=replace, found=found)

    def place(self, file: BinaryIO, name: str, replace: str) -> OperatorEntry:
        """Stores what was written to a new file of the store, once it is verified, and takes it into service.

        Raises as :meth:`check` does, and:
            ArtifactError: it is no whole operator, or not of the model being served.
            StoreFullError: the disk has no room, or with it too much would be in service.
            StoreUnwritableError: it cannot be stored. The store is as it was, here as above.
        """
        file.flush()
        # Before it is read; and once more when nobody else can change what is in service.
        self.check_room(name, os.fstat(file.fileno()).st_size)
        entry = self._registry.examine(name, Path(file.name))
        with self._one_at_a_time, self.store_errors():
            self.check(name, replace)
            self.check_room(name, entry.size_bytes)
            instead_of = replace if replace not in ("", ANY) else None
            try:
                self.store.place(file, name, replace=replace == ANY, instead_of=instead_of)
            except NameTakenError:
                # Another process was faster, here and below.
                raise OperatorExistsError(name, self._digest(name)) from None
            except OtherVersionError as error:
                raise OperatorChangedError(name, expected=replace, found=error.found) from None
            self.store.set_unloaded(name, False)
            return self._registry.put(entry)

    def load(self, name: str) -> OperatorEntry:
        """Takes an operator of the store into service.

        Raises :class:`UnknownOperatorError`, :class:`OperatorUnusableError` where its file cannot be used, and
        :class:`StoreFullError` where with it too much would be in service.
        """
        self._check_name(name)
        with self._one_at_a_time, self.store_errors():
            if name in self.store:
                self.check_room(name, self.store.path_of(name).lstat().st_size)
                self.store.set_unloaded(name, False)
            entry = self._registry.reload_one(name)
        if entry.problem:
            raise OperatorUnusableError(name, entry.problem)
        return entry

    def unload(self, name: str) -> OperatorEntry:
        """Takes an operator out of service, and keeps its file. Raises :class:`UnknownOperatorError`."""
        self._check_name(name)
        with self._one_at_a_time, self.store_errors():
            if name in self.store:
                self.store.set_unloaded(name, True)
            return self._registry.reload_one(name)

    def delete(self, name: str, digest: str) -> None:
        """Removes an operator's file where it has this digest; ``ANY`` is every one.

        Raises :class:`UnknownOperatorError`, :class:`OperatorChangedError` and :class:`InvalidRequestError`.
        """
        if digest != ANY and not _DIGEST.fullmatch(digest):
            problem = f"is {digest[:80]!r}; accepted: {ANY!r}, or sha256: and all 64 digits of what is to be deleted"
            raise InvalidRequestError("digest", problem)
        self._check_name(name)
        with self._one_at_a_time, self.store_errors():
            if name in self.store:
                self.check(name, digest)
                self.store.delete(name)
                try:
                    self._registry.reload_one(name)
                except UnknownOperatorError:
                    return
            raise self._unknown(name)

    @contextmanager
    def store_errors(self) -> Iterator[None]:
        """Errors of the file system become those of a request."""
        try:
            yield
        except (StoreError, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
                problem = f"the store has no room for it: {cause.strerror}; nothing of it was kept"
                raise StoreFullError(problem) from error
            said = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            raise StoreUnwritableError(f"the store cannot be written to: {said}") from error

    def check_room(self, name: str, size: int) -> None:
        """Whether so many bytes may come into service under a name; reads no file. Raises :class:`StoreFullError`."""
        others = self._registry.bytes_beside(name)
        if others + size > self._max_served:
            raise StoreFullError(
                f"operators in service take {others} bytes; with {size} more they would pass the {self._max_served} "
                "accepted (STEER_MAX_SERVED_BYTES); UnloadOperator (steer admin unload) makes room"
            )

    def _check_name(self, name: str, field: str = "") -> None:
        try:
            check_name(name)
        except StoreError as error:
            raise InvalidRequestError(f"{field}name", str(error)[:_MAX_PROBLEM]) from None
        check_granted([name])

    def _unknown(self, name: str) -> UnknownOperatorError:
        return UnknownOperatorError(name, tuple(entry.name for entry in self._registry.entries()))

    def _digest(self, name: str) -> str:
        """As the file has it; empty where that cannot be read."""
        try:
            return self.store.read_header(name).digest
        except (ArtifactError, StoreError):
            return ""
