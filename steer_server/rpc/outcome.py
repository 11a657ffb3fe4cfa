"""How a call ended: booked, logged in one line, and, where it failed, sent as a status."""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypeAlias

import grpc
import structlog

from steer_server.errors import (
    ACCESS_ERRORS,
    EngineFailedError,
    InvalidRequestError,
    SteerServerError,
    UnimplementedError,
)
from steer_server.metrics import Metrics
from steer_server.rpc.call_record import CURRENT, CallRecord
from steer_server.rpc.status import code_of, message_of, reason_of, status_of
from steer_server.tracing import names
from steer_server.tracing.base import Ending, Headers, Tracing

log = structlog.get_logger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_LATE_SECONDS = 0.1
_LATE_SHARE = 0.02
"""A client cancels at its own deadline, which may come a little before the server's: gRPC rounds it up on the way."""


_FAULTS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
"""Of the server, as OpenTelemetry counts them."""


class Outcome:
    """Surrounds the handling of one call."""

    def __init__(self, metrics: Metrics, tracing: Tracing, labels: tuple[str, str, str], context: Context) -> None:
        """``labels``: the kind of the call, its service and its method."""
        self._metrics, self._tracing, self._labels, self._context = metrics, tracing, labels, context
        self._record = CallRecord()

    async def __aenter__(self) -> None:
        self._began = time.monotonic()
        self._allowed = self._context.time_remaining()
        CURRENT.set(self._record)
        if not self._is_about_health:
            method = f"{self._labels[1]}/{self._labels[2]}"
            attributes = {names.RPC_SYSTEM: "grpc", names.RPC_METHOD: method}
            self._record.trace = self._tracing.begin(method, attributes, self._headers)
        self._metrics.started.labels(*self._labels).inc()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        failure = self._understood(error)
        code = self._code(failure)
        seconds = time.monotonic() - self._began
        self._metrics.handled.labels(*self._labels, code.name).inc()
        self._metrics.handling.labels(*self._labels).observe(seconds)
        if isinstance(failure, SteerServerError):
            self._metrics.errors.labels(self._labels[2], reason_of(failure)).inc()
        # A refusal of access has a line of the audit log, which no flood of them makes longer.
        if not self._record.is_refused and not isinstance(failure, ACCESS_ERRORS):
            self._log(code, failure, seconds)
        self._record.trace.end(_ending(code, failure))
        if isinstance(failure, SteerServerError):
            await self._context.abort_with_status(status_of(failure))
        if failure is not error and failure is not None:
            raise failure from None

    @property
    def _is_about_health(self) -> bool:
        """Asked every few seconds: there is nothing to say of each."""
        return "Health" in self._labels[1]

    def _headers(self) -> Headers:
        return self._context.invocation_metadata() or ()

    def _understood(self, error: BaseException | None) -> BaseException | None:
        """What an exception that nobody expected means to the caller; every other one as it is."""
        if not isinstance(error, Exception) or isinstance(error, SteerServerError | grpc.aio.AbortError):
            return error
        if isinstance(error, grpc.aio.BaseError) or self._context.cancelled():
            # gRPC's word for a write or a read on a call that has ended: the client has left.
            return asyncio.CancelledError()
        if isinstance(error, NotImplementedError):
            return UnimplementedError(f"{self._labels[1]}/{self._labels[2]}")
        log.exception("call failed", service=self._labels[1], method=self._labels[2], exc_info=error)
        return EngineFailedError(f"unexpected {type(error).__name__} in the server")

    def _log(self, code: grpc.StatusCode, failure: BaseException | None, seconds: float) -> None:
        method = self._labels[2]
        # A watch has no other end than the watcher's leaving, or the server's.
        ordinary = code is grpc.StatusCode.OK or (code is grpc.StatusCode.CANCELLED and method == "Watch")
        level = "warning" if not ordinary else "debug" if self._is_about_health else "info"
        said = {"code": code.name, "seconds": round(seconds, 3), "peer": self._context.peer()}
        getattr(log, level)(method, **said, **self._record.fields(), **problem_fields(failure))

    def _code(self, error: BaseException | None) -> grpc.StatusCode:
        if error is None:
            return grpc.StatusCode.OK
        if isinstance(error, SteerServerError):
            return code_of(error)
        if isinstance(error, asyncio.CancelledError):
            return grpc.StatusCode.DEADLINE_EXCEEDED if self._is_late() else grpc.StatusCode.CANCELLED
        number = self._context.code()
        return next((code for code in grpc.StatusCode if number in (code, code.value[0])), grpc.StatusCode.UNKNOWN)

    def _is_late(self) -> bool:
        left = self._context.time_remaining()
        if left is None or self._allowed is None:
            return False
        return left <= max(_LATE_SECONDS, _LATE_SHARE * self._allowed)


def _ending(code: grpc.StatusCode, failure: BaseException | None) -> Ending:
    said = problem_fields(failure)
    return Ending(
        {names.RPC_STATUS: code.name},
        error_type=said.get("reason", "" if code is grpc.StatusCode.OK else code.name),
        problem=said.get("problem", ""),
        is_fault=code in _FAULTS,
    )


def problem_fields(failure: BaseException | None) -> dict[str, str]:
    """What the log says of a failure, and never what the client sent."""
    if isinstance(failure, InvalidRequestError):
        # Its message may quote what the client sent.
        return {"reason": reason_of(failure), "field": failure.field}
    if isinstance(failure, SteerServerError):
        return {"reason": reason_of(failure), "problem": message_of(failure)}
    return {}
