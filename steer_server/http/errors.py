"""Each error as an answer: its status in HTTP, and a body of the shape that clients of OpenAI's API know.

``code`` is the reason of ``steer_server.rpc.status``, the same as over gRPC; ``status`` and ``details`` are gRPC's.
"""

from __future__ import annotations

import math
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from steer_server.errors import (
    InvalidRequestError,
    QueueFullError,
    RateLimitedError,
    SteerServerError,
    UnauthenticatedError,
)
from steer_server.http.refused import RefusedError
from steer_server.rpc.status import code_of, details_of, message_of, reason_of

CLIENT_LEFT = 499
"""Never sent; what the log and the metrics say of a call whose client has left."""
_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.DEADLINE_EXCEEDED: 408,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.INTERNAL: 500,
}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
}

Failure = SteerServerError | RefusedError


def http_status_of(error: Failure) -> int:
    """The status of an error."""
    return error.status if isinstance(error, RefusedError) else _STATUS[code_of(error)]


def headers_of(error: Failure) -> list[tuple[str, str]]:
    """What an answer says of an error beside its body."""
    if isinstance(error, RefusedError):
        return list(error.headers)
    if isinstance(error, UnauthenticatedError):
        return [("www-authenticate", "Bearer")]
    if isinstance(error, QueueFullError | RateLimitedError):
        # Whole seconds, rounded up: nobody comes back too early.
        return [("retry-after", str(math.ceil(error.retry_after)))]
    return []


def error_body(error: Failure) -> dict[str, Any]:
    """The body of an answer that is an error."""
    status = http_status_of(error)
    body: dict[str, Any] = {
        "message": str(error) if isinstance(error, RefusedError) else message_of(error),
        "type": _TYPES.get(status, _TYPES[400 if status < 500 else 500]),
    }
    if isinstance(error, RefusedError):
        return {"error": body | {"param": error.param, "code": error.code}}
    body["param"] = error.field if isinstance(error, InvalidRequestError) else None
    body |= {"code": reason_of(error), "status": code_of(error).name}
    return {"error": body | {"details": [MessageToDict(detail) for detail in details_of(error)]}}
