"""Every call about a server's store: its request, and how its answer is read. Nothing is sent here."""

from __future__ import annotations

from collections.abc import Iterator

from steering.v1 import operator_admin_pb2 as pb

from steer_client import _decode as decode
from steer_client import _encode as encode
from steer_client._admin import (
    CHUNK,
    BuildId,
    BuildOperatorRequest,
    DeleteOperatorRequest,
    GetUploadRequest,
    OperatorBuild,
    OperatorFile,
    OperatorName,
    UploadStart,
)
from steer_client._calls import Streaming, Unary, refuse_many
from steer_client._errors import ProtocolError, ServerError, ServerUnavailableError, SteerError
from steer_client._store import OperatorInfo

NOTHING_HELD = "UNKNOWN_UPLOAD"
#: Reasons of errors after which an upload goes on where the server says that it stands.
_INTERRUPTED = frozenset({"UPLOAD_OFFSET", "REQUEST_INCOMPLETE"})

# What grpc.aio makes of a call that the server ended while a message was written to it, in place of its status.
_ENDED_MEANWHILE = "Internal error from Core"

_write_upload_start = encode.checked_writer(pb.UploadStart, UploadStart)
_write_get_upload = encode.checked_writer(pb.GetUploadRequest, GetUploadRequest)
_write_load = encode.checked_writer(pb.LoadOperatorRequest, OperatorName)
_write_unload = encode.checked_writer(pb.UnloadOperatorRequest, OperatorName)
_write_build = encode.checked_writer(pb.BuildOperatorRequest, BuildOperatorRequest)
_write_watch = encode.checked_writer(pb.WatchBuildRequest, BuildId)
_write_cancel = encode.checked_writer(pb.CancelBuildRequest, BuildId)
_write_delete = encode.checked_writer(pb.DeleteOperatorRequest, DeleteOperatorRequest)


def upload(file: OperatorFile, offset: int, replace: str, target: str) -> Unary[OperatorInfo]:
    """A file from `offset` on."""
    refuse_many(target, "have the operator")
    start = _write_upload_start(
        UploadStart(file.upload_id, file.name, file.size_bytes, file.file_digest, offset, replace)
    )
    return Unary("admin", "UploadOperator", _Messages(file, start, offset), decode.one_operator)


def was_interrupted(error: SteerError) -> bool:
    """Whether an upload that failed goes on where the server says that it stands, or hears from it why not."""
    if isinstance(error, ServerUnavailableError) or error.reason in _INTERRUPTED:
        return True
    return isinstance(error, ServerError) and not error.reason and _ENDED_MEANWHILE in str(error)


def get_upload(upload_id: str) -> Unary[int]:
    """How many bytes of a file are held."""
    request = _write_get_upload(GetUploadRequest(upload_id))
    return Unary("admin", "GetUpload", request, lambda answer: int(answer.received_bytes))


def load(name: str, target: str) -> Unary[OperatorInfo]:
    """Into service."""
    refuse_many(target, "load it")
    return Unary("admin", "LoadOperator", _write_load(OperatorName(name)), decode.one_operator)


def unload(name: str, target: str) -> Unary[OperatorInfo]:
    """Out of service."""
    refuse_many(target, "unload it")
    return Unary("admin", "UnloadOperator", _write_unload(OperatorName(name)), decode.one_operator)


def delete(name: str, digest: str, target: str) -> Unary[None]:
    """Out of the store."""
    refuse_many(target, "delete it")
    request = _write_delete(DeleteOperatorRequest(name, digest))
    return Unary("admin", "DeleteOperator", request, lambda _: None)


def build(request: BuildOperatorRequest, target: str) -> Unary[OperatorBuild]:
    """A job that builds an operator."""
    refuse_many(target, "build it")
    return Unary("admin", "BuildOperator", _write_build(request), decode.build)


def watch(build_id: str) -> Streaming[OperatorBuild, OperatorBuild]:
    """A job up to its end."""
    return Streaming("WatchBuild", _write_watch(BuildId(build_id)), BuildReducer(), "admin")


def cancel(build_id: str) -> Unary[OperatorBuild]:
    """The end of a job."""
    return Unary("admin", "CancelBuild", _write_cancel(BuildId(build_id)), decode.build)


def builds() -> Unary[tuple[OperatorBuild, ...]]:
    """All jobs."""
    return Unary("admin", "ListBuilds", pb.ListBuildsRequest(), lambda answer: tuple(map(decode.build, answer.builds)))


class BuildReducer:
    """The reports of one job, the last of which is its end."""

    prompt_token_ids: tuple[int, ...] | None = None

    def __init__(self) -> None:
        self._last: OperatorBuild | None = None

    def feed(self, event: pb.OperatorBuild) -> OperatorBuild:
        self._last = decode.build(event)
        return self._last

    def finish(self) -> OperatorBuild:
        """Raises ProtocolError where the reports stop before the job has ended."""
        if self._last is None or not self._last.has_ended:
            raise ProtocolError("the server stopped to tell of a build before its end")
        return self._last


class _Messages:
    """The messages of an upload, from its beginning each time that they are iterated over."""

    def __init__(self, file: OperatorFile, start: pb.UploadStart, offset: int) -> None:
        self._file, self._start, self._offset = file, start, offset

    def __iter__(self) -> Iterator[pb.UploadOperatorRequest]:
        yield pb.UploadOperatorRequest(start=self._start)
        file = self._file
        sent = self._offset
        with open(file.path, "rb") as opened:
            opened.seek(sent)
            while chunk := opened.read(CHUNK):
                yield pb.UploadOperatorRequest(chunk=chunk)
                sent += len(chunk)
                if file.progress is not None:
                    file.progress(sent, file.size_bytes)
