"""Each error's gRPC status, reason and details: the one table of what a client can meet.

InvalidRequestError       INVALID_ARGUMENT     INVALID_REQUEST        BadRequest names the field
PromptTooLongError        INVALID_ARGUMENT     PROMPT_TOO_LONG        BadRequest names the field
DoseTooHighError          INVALID_ARGUMENT     DOSE_TOO_HIGH          BadRequest names the field
UnknownOperatorError      NOT_FOUND            UNKNOWN_OPERATOR       ResourceInfo names the operator
OperatorUnusableError     FAILED_PRECONDITION  OPERATOR_UNUSABLE      ResourceInfo names the operator
DigestNotServedError      FAILED_PRECONDITION  DIGEST_NOT_SERVED      ResourceInfo names the operator
QueueFullError            RESOURCE_EXHAUSTED   QUEUE_FULL             RetryInfo says when to try again
UnauthenticatedError      UNAUTHENTICATED      UNAUTHENTICATED
PermissionDeniedError     PERMISSION_DENIED    PERMISSION_DENIED
RateLimitedError          RESOURCE_EXHAUSTED   RATE_LIMITED           RetryInfo says when to try again
SteeringNotAppliedError   INTERNAL             STEERING_NOT_APPLIED
StoreUnreadableError      FAILED_PRECONDITION  STORE_UNREADABLE
StoreUnwritableError      FAILED_PRECONDITION  STORE_UNWRITABLE
StoreFullError            RESOURCE_EXHAUSTED   STORE_FULL
OperatorExistsError       ALREADY_EXISTS       OPERATOR_EXISTS        ResourceInfo names the operator
OperatorChangedError      FAILED_PRECONDITION  OPERATOR_CHANGED       ResourceInfo names the operator
UnknownUploadError        NOT_FOUND            UNKNOWN_UPLOAD
UnknownBuildError         NOT_FOUND            UNKNOWN_BUILD
UploadOffsetError         FAILED_PRECONDITION  UPLOAD_OFFSET
EngineFailedError         INTERNAL             ENGINE_FAILED
TimeLimitError            DEADLINE_EXCEEDED    TIME_LIMIT
RequestIncompleteError    DEADLINE_EXCEEDED    REQUEST_INCOMPLETE
SlowReaderError           DEADLINE_EXCEEDED    SLOW_READER
LoadingError              UNAVAILABLE          LOADING                RetryInfo says when to try again
ShuttingDownError         UNAVAILABLE          SHUTTING_DOWN
UnimplementedError        UNIMPLEMENTED        UNIMPLEMENTED
"""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from steer_server.errors import (
    DigestNotServedError,
    DoseTooHighError,
    EngineFailedError,
    InvalidRequestError,
    LoadingError,
    OperatorChangedError,
    OperatorExistsError,
    OperatorUnusableError,
    PermissionDeniedError,
    PromptTooLongError,
    QueueFullError,
    RateLimitedError,
    RequestIncompleteError,
    ShuttingDownError,
    SlowReaderError,
    SteeringNotAppliedError,
    SteerServerError,
    StoreFullError,
    StoreUnreadableError,
    StoreUnwritableError,
    TimeLimitError,
    UnauthenticatedError,
    UnimplementedError,
    UnknownBuildError,
    UnknownOperatorError,
    UnknownUploadError,
    UploadOffsetError,
)

DOMAIN = "steering.v1"
# A status crosses the wire in headers: the message percent-encoded, and once more, with the details, in base64. gRPC
# takes 8 KiB of headers; beyond that the client gets RESOURCE_EXHAUSTED instead of the status.
_MAX_MESSAGE_BYTES = 1024
_MAX_NAME_BYTES = 256
TABLE: dict[type[SteerServerError], tuple[grpc.StatusCode, str]] = {
    InvalidRequestError: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    PromptTooLongError: (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG"),
    DoseTooHighError: (grpc.StatusCode.INVALID_ARGUMENT, "DOSE_TOO_HIGH"),
    UnknownOperatorError: (grpc.StatusCode.NOT_FOUND, "UNKNOWN_OPERATOR"),
    OperatorUnusableError: (grpc.StatusCode.FAILED_PRECONDITION, "OPERATOR_UNUSABLE"),
    DigestNotServedError: (grpc.StatusCode.FAILED_PRECONDITION, "DIGEST_NOT_SERVED"),
    QueueFullError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    UnauthenticatedError: (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    PermissionDeniedError: (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    RateLimitedError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED"),
    SteeringNotAppliedError: (grpc.StatusCode.INTERNAL, "STEERING_NOT_APPLIED"),
    StoreUnreadableError: (grpc.StatusCode.FAILED_PRECONDITION, "STORE_UNREADABLE"),
    StoreUnwritableError: (grpc.StatusCode.FAILED_PRECONDITION, "STORE_UNWRITABLE"),
    StoreFullError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"),
    OperatorExistsError: (grpc.StatusCode.ALREADY_EXISTS, "OPERATOR_EXISTS"),
    OperatorChangedError: (grpc.StatusCode.FAILED_PRECONDITION, "OPERATOR_CHANGED"),
    UnknownUploadError: (grpc.StatusCode.NOT_FOUND, "UNKNOWN_UPLOAD"),
    UnknownBuildError: (grpc.StatusCode.NOT_FOUND, "UNKNOWN_BUILD"),
    UploadOffsetError: (grpc.StatusCode.FAILED_PRECONDITION, "UPLOAD_OFFSET"),
    EngineFailedError: (grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
    TimeLimitError: (grpc.StatusCode.DEADLINE_EXCEEDED, "TIME_LIMIT"),
    RequestIncompleteError: (grpc.StatusCode.DEADLINE_EXCEEDED, "REQUEST_INCOMPLETE"),
    SlowReaderError: (grpc.StatusCode.DEADLINE_EXCEEDED, "SLOW_READER"),
    LoadingError: (grpc.StatusCode.UNAVAILABLE, "LOADING"),
    ShuttingDownError: (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"),
    UnimplementedError: (grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED"),
}


def code_of(error: SteerServerError) -> grpc.StatusCode:
    """The gRPC status of an error."""
    return TABLE[type(error)][0]


def reason_of(error: SteerServerError) -> str:
    """The stable name of an error's cause."""
    return TABLE[type(error)][1]


def message_of(error: SteerServerError) -> str:
    """The error's text, cut to what fits into a header."""
    return _cut(str(error), _MAX_MESSAGE_BYTES)


def status_of(error: SteerServerError) -> grpc.Status:
    """Status, message and details, ready for ``abort_with_status``."""
    wire = status_pb2.Status(code=code_of(error).value[0], message=message_of(error), details=details_of(error))
    status: grpc.Status = rpc_status.to_status(wire)
    return status


def details_of(error: SteerServerError) -> list[AnyMessage]:
    """What a client can act upon without reading the message."""
    message = message_of(error)
    reason = reason_of(error)
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=_metadata(error))]
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, UnknownOperatorError | OperatorUnusableError | OperatorExistsError | OperatorChangedError):
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type="steering.v1.Operator",
                resource_name=_cut(error.name, _MAX_NAME_BYTES),
                description=message,
            )
        )
    if isinstance(error, QueueFullError | RateLimitedError | LoadingError):
        delay = Duration(seconds=int(error.retry_after), nanos=int(error.retry_after % 1 * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(AnyMessage())
        packed[-1].Pack(detail)
    return packed


def _metadata(error: SteerServerError) -> dict[str, str]:
    if isinstance(error, DoseTooHighError):
        return {"layer": str(error.layer), "dose": repr(error.dose), "max_dose": repr(error.max_dose)}
    if isinstance(error, DigestNotServedError):
        return {"requested": error.requested, "served": error.served}
    if isinstance(error, OperatorExistsError):
        return {"found": error.found}
    if isinstance(error, OperatorChangedError):
        return {"expected": _cut(error.expected, _MAX_NAME_BYTES), "found": error.found}
    if isinstance(error, UploadOffsetError):
        return {"received_bytes": str(error.received)}
    return {}


def _cut(text: str, size: int) -> str:
    """The beginning of a text that is at most ``size`` bytes long."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= size:
        return text
    return encoded[: size - len("…".encode())].decode(errors="ignore") + "…"
