"""Around every RPC: typed errors become gRPC statuses, and each call is counted and logged once."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import structlog

from steer_server.caller import CALLER
from steer_server.errors import EngineFailedError, SteerServerError, UnimplementedError
from steer_server.metrics import Metrics
from steer_server.rpc.admission import Admission
from steer_server.rpc.caller import caller_of
from steer_server.rpc.status import code_of, message_of, status_of

log = structlog.get_logger(__name__)

_Behaviour = Callable[[Any, Any], Any]
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class CallInterceptor(grpc.aio.ServerInterceptor):
    """One interceptor for all: it sees the errors of the services, the status of the call and its duration.

    Response streams are passed on as they are, written by the handler itself (as the standard health service does)
    or yielded; both kinds are kept.
    """

    def __init__(self, metrics: Metrics, admission: Admission) -> None:
        self._metrics, self._admission = metrics, admission

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wraps the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        call = _Call(self._metrics, self._admission, handler_call_details.method, handler)
        kind, behaviour = _behaviour(handler)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        wrapped: _Handler = make(
            call.stream(behaviour) if handler.response_streaming else call.unary(behaviour),
            # Requests are read inside, so that those that are not accepted meet the same errors and counters.
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )
        return wrapped


class _Call:
    def __init__(self, metrics: Metrics, admission: Admission, method: str, handler: _Handler) -> None:
        _, service, name = method.split("/")
        self._metrics, self._admission, self._method = metrics, admission, method
        self._labels = (_behaviour(handler)[0], service, name)
        self._parse: Callable[[bytes], Any] = handler.request_deserializer or bytes
        self._streams_requests = handler.request_streaming

    def unary(self, behaviour: _Behaviour) -> _Behaviour:
        async def run(request: Any, context: _Context) -> Any:
            async with _Outcome(self._metrics, self._labels, context):
                CALLER.set(caller_of(context))
                return await behaviour(self._read(request), context)

        return run

    def stream(self, behaviour: _Behaviour) -> _Behaviour:
        async def run(request: Any, context: _Context) -> None:
            async with _Outcome(self._metrics, self._labels, context):
                CALLER.set(caller_of(context))
                produced = behaviour(self._read(request), context)
                if inspect.isawaitable(produced):
                    await produced
                    return
                await self._forward(produced, context)

        return run

    def _read(self, request: Any) -> Any:
        """The message, or the messages as they come."""
        if self._streams_requests:
            return self._read_each(request)
        return self._admission.read(self._method, request, self._parse)

    async def _read_each(self, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for each in requests:
            yield self._admission.read(self._method, each, self._parse)

    async def _forward(self, messages: AsyncIterator[Any], context: _Context) -> None:
        sent = self._metrics.sent.labels(*self._labels)
        try:
            async for message in messages:
                await context.write(message)
                sent.inc()
        finally:
            # A client that has gone leaves the generator half-way: close it now, so that its work stops now.
            close = getattr(messages, "aclose", None)
            if close is not None:
                await close()


class _Outcome:
    """Books how a call ended, and turns a typed error into its status."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str, str], context: _Context) -> None:
        self._metrics, self._labels, self._context = metrics, labels, context

    async def __aenter__(self) -> None:
        self._began = time.monotonic()
        self._metrics.started.labels(*self._labels).inc()
        self._metrics.in_flight[self._labels[1]] += 1

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._metrics.in_flight[self._labels[1]] -= 1
        failure = error
        if isinstance(error, NotImplementedError):
            failure = UnimplementedError(f"{self._labels[1]}/{self._labels[2]}")
        elif isinstance(error, Exception) and not isinstance(error, SteerServerError | grpc.aio.AbortError):
            log.exception("call failed", service=self._labels[1], method=self._labels[2], exc_info=error)
            failure = EngineFailedError(f"unexpected {type(error).__name__} in the server")
        code = self._code(failure)
        seconds = time.monotonic() - self._began
        self._metrics.handled.labels(*self._labels, code.name).inc()
        self._metrics.handling.labels(*self._labels).observe(seconds)
        # A watch has no other end than the watcher's leaving, or the server's.
        ordinary = code is grpc.StatusCode.OK or (code is grpc.StatusCode.CANCELLED and self._labels[2] == "Watch")
        level = "warning" if not ordinary else "debug" if "Health" in self._labels[1] else "info"
        text = message_of(failure) if isinstance(failure, SteerServerError) else None
        getattr(log, level)(
            self._labels[2], code=code.name, seconds=round(seconds, 3), **({"problem": text} if text else {})
        )
        if isinstance(failure, SteerServerError):
            await self._context.abort_with_status(status_of(failure))

    def _code(self, error: BaseException | None) -> grpc.StatusCode:
        if error is None:
            return grpc.StatusCode.OK
        if isinstance(error, SteerServerError):
            return code_of(error)
        if isinstance(error, asyncio.CancelledError):
            left = self._context.time_remaining()
            late = left is not None and left <= 0
            return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        number = self._context.code()
        return next((code for code in grpc.StatusCode if number in (code, code.value[0])), grpc.StatusCode.UNKNOWN)


def _behaviour(handler: _Handler) -> tuple[str, _Behaviour]:
    """The handler's kind ("unary_stream", ...) and its function."""
    request = "stream" if handler.request_streaming else "unary"
    response = "stream" if handler.response_streaming else "unary"
    kind = f"{request}_{response}"
    behaviour: _Behaviour = getattr(handler, kind)
    return kind, behaviour
