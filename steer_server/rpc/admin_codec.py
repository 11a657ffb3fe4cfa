"""Messages about changes of the store to the server's nouns, and back."""

from __future__ import annotations

from steering.convert import FieldError, reader, writer
from steering.v1 import operator_admin_pb2 as pb

from steer_server.errors import InvalidRequestError
from steer_server.registry import OperatorEntry
from steer_server.rpc.operator_codec import operator
from steer_server.types import BuildRequest, OperatorBuild, UploadStart

_read_upload_start = reader(pb.UploadStart, UploadStart)
_read_build_request = reader(pb.BuildOperatorRequest, BuildRequest)
_write_build = writer(pb.OperatorBuild, OperatorBuild)


def upload_start(message: pb.UploadStart) -> UploadStart:
    """Raises :class:`InvalidRequestError` naming the field at fault."""
    try:
        return _read_upload_start(message)
    except FieldError as error:
        raise InvalidRequestError(f"start.{error.path}", error.problem) from None


def build_request(message: pb.BuildOperatorRequest) -> BuildRequest:
    """See :func:`upload_start`."""
    try:
        return _read_build_request(message)
    except FieldError as error:
        raise InvalidRequestError(error.path, error.problem) from None


def build(job: OperatorBuild, entry: OperatorEntry | None = None) -> pb.OperatorBuild:
    """A job, and what it has built."""
    return _write_build(job, operator=None if entry is None else operator(entry))
