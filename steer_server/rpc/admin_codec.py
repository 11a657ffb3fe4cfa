"""Messages about changes of the store to the server's nouns."""

from __future__ import annotations

from steering.convert import FieldError, reader
from steering.v1 import operator_admin_pb2 as pb

from steer_server.errors import InvalidRequestError
from steer_server.types import UploadStart

_read_upload_start = reader(pb.UploadStart, UploadStart)


def upload_start(message: pb.UploadStart) -> UploadStart:
    """Raises :class:`InvalidRequestError` naming the field at fault."""
    try:
        return _read_upload_start(message)
    except FieldError as error:
        raise InvalidRequestError(f"start.{error.path}", error.problem) from None
