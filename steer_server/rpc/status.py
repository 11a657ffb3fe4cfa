"""Each error's gRPC status, reason and details: the one table of what a client can meet.

InvalidRequestError       INVALID_ARGUMENT     INVALID_REQUEST        BadRequest names the field
PromptTooLongError        INVALID_ARGUMENT     PROMPT_TOO_LONG        BadRequest names the field
UnknownOperatorError      NOT_FOUND            UNKNOWN_OPERATOR       ResourceInfo names the operator
OperatorUnusableError     FAILED_PRECONDITION  OPERATOR_UNUSABLE      ResourceInfo names the operator
QueueFullError            RESOURCE_EXHAUSTED   QUEUE_FULL             RetryInfo says when to try again
SteeringNotAppliedError   INTERNAL             STEERING_NOT_APPLIED
EngineFailedError         INTERNAL             ENGINE_FAILED
ShuttingDownError         UNAVAILABLE          SHUTTING_DOWN
"""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from steer_server.errors import (
    EngineFailedError,
    InvalidRequestError,
    OperatorUnusableError,
    PromptTooLongError,
    QueueFullError,
    ShuttingDownError,
    SteeringNotAppliedError,
    SteerServerError,
    UnknownOperatorError,
)

DOMAIN = "steering.v1"
TABLE: dict[type[SteerServerError], tuple[grpc.StatusCode, str]] = {
    InvalidRequestError: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    PromptTooLongError: (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG"),
    UnknownOperatorError: (grpc.StatusCode.NOT_FOUND, "UNKNOWN_OPERATOR"),
    OperatorUnusableError: (grpc.StatusCode.FAILED_PRECONDITION, "OPERATOR_UNUSABLE"),
    QueueFullError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    SteeringNotAppliedError: (grpc.StatusCode.INTERNAL, "STEERING_NOT_APPLIED"),
    EngineFailedError: (grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
    ShuttingDownError: (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"),
}


def code_of(error: SteerServerError) -> grpc.StatusCode:
    """The gRPC status of an error."""
    return TABLE[type(error)][0]


def status_of(error: SteerServerError) -> grpc.Status:
    """Status, message and details, ready for ``abort_with_status``."""
    code, reason = TABLE[type(error)]
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)]
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, UnknownOperatorError | OperatorUnusableError):
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type="steering.v1.Operator", resource_name=error.name, description=str(error)
            )
        )
    if isinstance(error, QueueFullError):
        delay = Duration(seconds=int(error.retry_after), nanos=int(error.retry_after % 1 * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(AnyMessage())
        packed[-1].Pack(detail)
    # The message crosses the wire in a header, which proxies limit to a few kilobytes.
    status: grpc.Status = rpc_status.to_status(
        status_pb2.Status(code=code.value[0], message=str(error)[:1024], details=packed)
    )
    return status
