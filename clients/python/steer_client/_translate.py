"""From a gRPC status to a typed error. No other module reads a status."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from steer_client import _errors as errors
from steer_client._tls_problems import problem_of_tls, todo_when_closed

_DOMAIN = "steering.v1"
_DETAILS_KEY = "grpc-status-details-bin"
_Code = grpc.StatusCode

_BY_REASON: dict[tuple[grpc.StatusCode, str], type[errors.SteerError]] = {
    (_Code.INVALID_ARGUMENT, "INVALID_REQUEST"): errors.InvalidRequestError,
    (_Code.INVALID_ARGUMENT, "PROMPT_TOO_LONG"): errors.PromptTooLongError,
    (_Code.INVALID_ARGUMENT, "DOSE_TOO_HIGH"): errors.DoseTooHighError,
    (_Code.NOT_FOUND, "UNKNOWN_OPERATOR"): errors.UnknownOperatorError,
    (_Code.FAILED_PRECONDITION, "OPERATOR_UNUSABLE"): errors.OperatorUnusableError,
    (_Code.FAILED_PRECONDITION, "DIGEST_NOT_SERVED"): errors.DigestNotServedError,
    (_Code.ALREADY_EXISTS, "OPERATOR_EXISTS"): errors.OperatorExistsError,
    (_Code.FAILED_PRECONDITION, "OPERATOR_CHANGED"): errors.OperatorChangedError,
    (_Code.NOT_FOUND, "UNKNOWN_BUILD"): errors.UnknownBuildError,
    (_Code.RESOURCE_EXHAUSTED, "STORE_FULL"): errors.StoreFullError,
    (_Code.RESOURCE_EXHAUSTED, "QUEUE_FULL"): errors.ServerBusyError,
    (_Code.RESOURCE_EXHAUSTED, "RATE_LIMITED"): errors.ServerBusyError,
    (_Code.INTERNAL, "STEERING_NOT_APPLIED"): errors.SteeringNotAppliedError,
    (_Code.INTERNAL, "ENGINE_FAILED"): errors.EngineFailedError,
}
# These codes mean the same with any reason.
_BY_CODE: dict[grpc.StatusCode, type[errors.SteerError]] = {
    _Code.UNAUTHENTICATED: errors.UnauthenticatedError,
    _Code.PERMISSION_DENIED: errors.PermissionDeniedError,
    _Code.UNAVAILABLE: errors.ServerUnavailableError,
    _Code.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    _Code.CANCELLED: errors.RequestCancelledError,
}
# A status that came without details (a proxy may drop them) still has its code.
_WITHOUT_REASON: dict[grpc.StatusCode, type[errors.SteerError]] = {
    _Code.INVALID_ARGUMENT: errors.InvalidRequestError,
    _Code.NOT_FOUND: errors.UnknownOperatorError,
    _Code.FAILED_PRECONDITION: errors.OperatorUnusableError,
    _Code.RESOURCE_EXHAUSTED: errors.ServerBusyError,
}


class _Details(NamedTuple):
    reason: str
    metadata: dict[str, str]
    field: str
    retry_after: float | None


def translate_error(
    error: grpc.RpcError, *, target: str, timeout: float | None = None, has_tls: bool = False, has_token: bool = True
) -> errors.SteerError:
    """The typed error for a failed call, sync or async, unary or streaming.

    `target`, `timeout` (seconds), `has_tls` and `has_token` are those of the call; the message depends on them.
    """
    # Every RpcError that a call raises is also a grpc.Call; the base class alone carries no status.
    code: grpc.StatusCode = error.code()
    text: str = error.details() or ""
    details = _details(error)
    if details.reason:
        kind = _BY_REASON.get((code, details.reason)) or _BY_CODE.get(code, errors.ServerError)
        if code is _Code.RESOURCE_EXHAUSTED and details.retry_after is not None:
            # Whatever is used up, it comes back.
            kind = errors.ServerBusyError
    else:
        kind = _BY_CODE.get(code) or _WITHOUT_REASON.get(code, errors.ServerError)
        if code is _Code.RESOURCE_EXHAUSTED and "larger than max" in text:
            # gRPC uses this code for its limit on message sizes too, where waiting does not help.
            kind = errors.ServerError
    tls_problem = None if details.reason else problem_of_tls(text, target)
    if kind is errors.ServerUnavailableError and tls_problem:
        return errors.TLSError(tls_problem, code=code)
    message = _message(kind, code, text, details, target, timeout, has_tls)
    if kind is errors.UnauthenticatedError and not has_token:
        message += "; give one by token= or token_file= (--token-file, STEER_TOKEN)"
    status = errors.Status(code=code, reason=details.reason, metadata=details.metadata)
    if issubclass(kind, errors.InvalidRequestError):
        return kind(message, field=details.field, **status)
    if issubclass(kind, errors.ServerBusyError):
        return kind(message, retry_after=details.retry_after, **status)
    if issubclass(kind, errors.ServerUnavailableError):
        is_unsent = not details.reason and "failed to connect to" in text.lower()
        return kind(message, is_unsent=is_unsent, **status)
    return kind(message, **status)


def cancelled() -> errors.RequestCancelledError:
    """The error for a call that this process cancelled."""
    return errors.RequestCancelledError("the request was cancelled")


def _message(
    kind: type[errors.SteerError],
    code: grpc.StatusCode,
    text: str,
    details: _Details,
    target: str,
    timeout: float | None,
    has_tls: bool,
) -> str:
    if details.reason and text:
        return text
    if kind is errors.ServerUnavailableError:
        # gRPC's text names every layer that failed; the last one is the cause.
        cause = text.rsplit(": ", 1)[-1].strip()
        todo = todo_when_closed(text, has_tls=has_tls) or "is steer-server running there?"
        return f"no answer from {target}{f' ({cause})' if cause else ''}: {todo}"
    if kind is errors.UnauthenticatedError:
        return f"{target}, or a proxy before it, asks for a token{f' ({text})' if text else ''}"
    if kind is errors.PermissionDeniedError:
        return f"{target} does not allow this{f' ({text})' if text else ''}"
    if kind is errors.DeadlineExceededError:
        within = "in time" if timeout is None else f"within {timeout:g} s"
        return f"{target} did not finish the request {within}"
    if kind is errors.RequestCancelledError:
        return "the request was cancelled"
    if kind is errors.ServerError:
        return f"{target} answered {code.name}{f': {text}' if text else ''}"
    return text or f"{target} answered {code.name}"


def _details(error: grpc.RpcError) -> _Details:
    reason, metadata, field, retry_after = "", dict[str, str](), "", None
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for packed in _status(error).details:
        if _unpack(packed, info) and info.domain == _DOMAIN:
            reason, metadata = info.reason, dict(info.metadata)
        elif _unpack(packed, bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif _unpack(packed, retry):
            retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return _Details(reason, metadata, field, retry_after)


def _unpack(packed: Any, into: Message) -> bool:
    try:
        return packed.Unpack(into)
    except DecodeError:
        return False


def _status(error: grpc.RpcError) -> status_pb2.Status:
    # Read from the trailing metadata, which is the same for sync and async calls: grpc_status has a helper for each,
    # and both refuse the whole status when one part of it is malformed. Its items are pairs, although typed otherwise.
    trailing = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    for key, value in trailing:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()
