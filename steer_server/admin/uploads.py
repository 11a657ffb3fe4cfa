"""Files on their way into the store.

What has come of one is in a hidden file of the store, under a lock that this process holds: a server that is killed
leaves a file that the next one removes. How far each has come is in memory alone, so that it goes on after a broken
connection, and begins anew after a restart.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import structlog

from operators.core.errors import ArtifactError
from steer_server.admin.keeper import Keeper
from steer_server.admin.threads import FileThreads
from steer_server.errors import (
    InvalidRequestError,
    QueueFullError,
    SteerServerError,
    StoreFullError,
    UnknownUploadError,
    UploadOffsetError,
)
from steer_server.registry import OperatorEntry
from steer_server.types import UploadStart

log = structlog.get_logger(__name__)


_AGAIN = 10.0
"""Seconds: when to try again where too many are unfinished."""
_MAX_PROBLEM = 1024
"""Characters."""


@dataclass
class _Upload:
    start: UploadStart
    file: BinaryIO
    removal: ExitStack
    """Closed, it removes the file, unless that was placed."""
    received: int = 0
    so_far: hashlib._Hash = field(default_factory=hashlib.sha256)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    sender: object = None
    """The call that may go on with it: the last that asked for it. An earlier one may be of a connection that broke."""
    expiry: asyncio.TimerHandle | None = None

    def write(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.so_far.update(chunk)
        self.received += len(chunk)

    def remove(self) -> None:
        """The file, unless it was placed."""
        # A disk that is full says so once more when the file is closed.
        with suppress(OSError):
            self.removal.close()


class Uploads:
    """Those that are not finished. Belongs to one event loop."""

    def __init__(
        self,
        keeper: Keeper,
        threads: FileThreads,
        *,
        max_file: int,
        max_uploads: int,
        max_bytes: int,
        keep_seconds: float,
    ) -> None:
        """
        Args:
            max_file: bytes of one file.
            max_uploads, max_bytes: how many may be unfinished at once, and the bytes that all of them will have.
            keep_seconds: how long one is kept that nothing comes of.
        """
        self._keeper, self._threads = keeper, threads
        self._max_file, self._max_uploads, self._max_bytes = max_file, max_uploads, max_bytes
        self._keep_seconds = keep_seconds
        self._unfinished: dict[str, _Upload] = {}
        self._opening = asyncio.Lock()
        """Held while a new one gets its file: another call of the same id then finds it."""
        self._expiring: set[asyncio.Future[None]] = set()

    def find(self, upload_id: str) -> tuple[int, int]:
        """Bytes held of an unfinished one, and of the whole file. Raises :class:`UnknownUploadError`."""
        found = self._unfinished.get(upload_id)
        if found is None:
            raise UnknownUploadError(upload_id[:80])
        return found.received, found.start.size_bytes

    async def receive(self, start: UploadStart, chunks: AsyncIterator[bytes]) -> OperatorEntry:
        """Takes what comes of a file; when it is whole, it is stored and in service.

        Where the chunks end early or stop coming, what has come is kept for the same ``upload_id``.

        Raises:
            InvalidRequestError: it is no operator of this model, not what ``start`` says, or too large.
            UploadOffsetError: it does not go on where it was left, another call goes on with it, or it is not whole.
            QueueFullError, StoreFullError, StoreUnwritableError: too many are unfinished, or it cannot be written.
            OperatorExistsError, OperatorChangedError, UnknownOperatorError: see :meth:`Keeper.check`.
        """
        sender = object()
        upload = await self._begin(start, sender)
        try:
            async for chunk in chunks:
                await self._write(upload, sender, chunk)
            return await self._finish(upload, sender)
        except InvalidRequestError:
            if upload.sender is sender:
                await self._drop(upload)
            raise
        finally:
            self._rest(upload, sender)

    async def close(self) -> None:
        """Removes what has come of all that are not finished."""
        for upload in tuple(self._unfinished.values()):
            await self._drop(upload)
        await asyncio.gather(*self._expiring, return_exceptions=True)

    async def _begin(self, start: UploadStart, sender: object) -> _Upload:
        await self._threads.ask(lambda: self._keeper.check(start.name, start.replace, field="start."))
        async with self._opening:
            upload = self._unfinished.get(start.upload_id) or await self._new(start)
        if replace(start, offset=0) != replace(upload.start, offset=0):
            raise InvalidRequestError("start.upload_id", "is that of another upload, which is not finished")
        async with upload.turn:
            self._check_unfinished(upload)
            if start.offset != upload.received:
                raise UploadOffsetError(
                    f"{upload.received} bytes of this upload are held; it cannot go on at {start.offset}",
                    received=upload.received,
                )
            if upload.expiry is not None:
                upload.expiry.cancel()
            upload.sender = sender
        return upload

    def _check_unfinished(self, upload: _Upload, sender: object = None) -> None:
        if self._unfinished.get(upload.start.upload_id) is not upload:
            raise UploadOffsetError("this upload ended in the meantime", received=0)
        if sender is not None and upload.sender is not sender:
            raise UploadOffsetError("another call goes on with this upload", received=upload.received)

    async def _new(self, start: UploadStart) -> _Upload:
        if start.size_bytes > self._max_file:
            raise InvalidRequestError(
                "start.size_bytes",
                f"is {start.size_bytes}; at most {self._max_file} are read (STEER_MAX_ARTIFACT_BYTES)",
            )
        self._keeper.check_room(start.name, start.size_bytes)
        if start.offset:
            raise UploadOffsetError("nothing of this upload is held; it begins at 0", received=0)
        if len(self._unfinished) >= self._max_uploads:
            raise QueueFullError(f"{len(self._unfinished)} uploads are unfinished, the most accepted", _AGAIN)
        taken = sum(each.start.size_bytes for each in self._unfinished.values())
        if taken + start.size_bytes > self._max_bytes:
            raise StoreFullError(
                f"unfinished uploads will take {taken} bytes; with {start.size_bytes} more they would pass the "
                f"{self._max_bytes} accepted (STEER_MAX_UPLOAD_BYTES)"
            )
        removal = ExitStack()
        try:
            with self._keeper.store_errors():
                file = await self._threads.to_its_end(
                    lambda: removal.enter_context(self._keeper.store.new_file(start.name))
                )
        except asyncio.CancelledError:
            await self._threads.to_its_end(removal.close)
            raise
        upload = self._unfinished[start.upload_id] = _Upload(start, file, removal)
        return upload

    async def _write(self, upload: _Upload, sender: object, chunk: bytes) -> None:
        total = upload.start.size_bytes
        async with upload.turn:
            self._check_unfinished(upload, sender)
            if not chunk or upload.received + len(chunk) > total:
                found = f"would be byte {upload.received + len(chunk)} of {total}" if chunk else "is empty"
                raise InvalidRequestError("chunk", f"{found}; what has come of this upload was removed")
            try:
                with self._keeper.store_errors():
                    await self._threads.to_its_end(lambda: upload.write(chunk))
            except SteerServerError:
                await self._drop(upload)
                raise

    async def _finish(self, upload: _Upload, sender: object) -> OperatorEntry:
        async with upload.turn:
            self._check_unfinished(upload, sender)
            if upload.received < upload.start.size_bytes:
                raise UploadOffsetError(
                    f"{upload.received} of {upload.start.size_bytes} bytes have come; the others may follow under the "
                    "same id",
                    received=upload.received,
                )
            return await self._store(upload)

    async def _store(self, upload: _Upload) -> OperatorEntry:
        start, found = upload.start, f"sha256:{upload.so_far.hexdigest()}"
        try:
            if found != start.file_digest:
                problem = f"is {start.file_digest}, and what came has {found}: it was damaged on the way, or changed"
                raise InvalidRequestError("start.file_digest", problem)
            return await self._threads.to_its_end(lambda: self._keeper.place(upload.file, start.name, start.replace))
        except ArtifactError as error:
            raise InvalidRequestError("chunk", f"is of no operator for this server: {error}"[:_MAX_PROBLEM]) from None
        finally:
            await self._drop(upload)

    def _rest(self, upload: _Upload, sender: object) -> None:
        if upload.sender is sender and self._unfinished.get(upload.start.upload_id) is upload:
            loop = asyncio.get_running_loop()
            upload.expiry = loop.call_later(self._keep_seconds, self._expire, upload)

    def _expire(self, upload: _Upload) -> None:
        log.info("upload given up", operator=upload.start.name, received=upload.received)
        self._forget(upload)
        removing = self._threads.start(upload.remove)
        self._expiring.add(removing)
        removing.add_done_callback(self._expiring.discard)

    async def _drop(self, upload: _Upload) -> None:
        self._forget(upload)
        await self._threads.to_its_end(upload.remove)

    def _forget(self, upload: _Upload) -> None:
        if self._unfinished.get(upload.start.upload_id) is upload:
            del self._unfinished[upload.start.upload_id]
        if upload.expiry is not None:
            upload.expiry.cancel()
