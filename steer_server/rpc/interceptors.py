"""Around every RPC: its request is received, its answer sent, both in bounded time, and its end is booked.

A handler that takes one request is registered with gRPC as one that takes a stream, so that it is called as soon as
the call begins: only then can a call whose request never comes be counted, limited and ended.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import grpc

from steer_server.access.control import AccessControl
from steer_server.caller import CALLER
from steer_server.errors import InvalidRequestError, SlowReaderError, UnimplementedError
from steer_server.metrics import OTHER, Metrics
from steer_server.rpc.admission import Admission
from steer_server.rpc.call_limit import CallLimit, Place
from steer_server.rpc.call_record import current_call
from steer_server.rpc.caller import authorization_of, caller_of
from steer_server.rpc.outcome import Context, Outcome
from steer_server.tracing.base import NO_TRACING, Tracing

_Behaviour = Callable[[Any, Any], Any]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_NO_METHOD = ("stream_stream", OTHER, OTHER)
"""What metrics, logs and traces call every method that is not served, whatever its caller does."""
_MAX_METHOD = 200
"""Characters of it that a refusal repeats."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """One interceptor for all: it sees the errors of the services, the status of the call and its duration.

    Response streams are passed on as they are, written by the handler itself (as the standard health service does)
    or yielded; both kinds are kept.
    """

    def __init__(
        self,
        metrics: Metrics,
        admission: Admission,
        limits: Mapping[str, CallLimit],
        access: AccessControl,
        *,
        patience: float,
        is_admin: bool = False,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        """``limits``: by method. ``patience``: seconds for a request to arrive, and for each answer to be taken.
        ``is_admin``: whether it is of the listener for admin calls.
        """
        self.metrics, self.admission, self.limits, self.patience = metrics, admission, limits, patience
        self.access, self.is_admin, self.tracing = access, is_admin, tracing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wraps the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            # Registered as what takes any number of messages, none of which is read.
            return grpc.stream_stream_rpc_method_handler(partial(self._refuse, handler_call_details.method))
        call = _Call(self, handler_call_details.method, handler)
        streams = handler.response_streaming
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        wrapped: _Handler = make(
            # Requests are read inside, so that those that are not accepted meet the same errors and counters.
            call.stream if streams else call.unary,
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )
        return wrapped

    async def _refuse(self, method: str, _requests: object, context: Context) -> None:
        """Answers a call of a method that is not served."""
        async with Outcome(self.metrics, self.tracing, _NO_METHOD, context):
            with self.access.recognised(OTHER, authorization_of(context), context.peer() or "") as grant:
                current_call().token = grant.token
                raise UnimplementedError(method[1:_MAX_METHOD])


class _Call:
    def __init__(self, interceptor: CallInterceptor, method: str, handler: _Handler) -> None:
        _, service, name = method.split("/")
        kind, self._behaviour = _behaviour(handler)
        self._labels = (kind, service, name)
        self._method = method
        self._metrics, self._admission, self._tracing = interceptor.metrics, interceptor.admission, interceptor.tracing
        self._limit, self._patience = interceptor.limits[method], interceptor.patience
        self._access, self._is_admin = interceptor.access, interceptor.is_admin
        self._parse: Callable[[bytes], Any] = handler.request_deserializer or bytes
        self._streams_requests = handler.request_streaming

    async def unary(self, requests: Any, context: Context) -> Any:
        """Handles a call with one answer."""
        async with Outcome(self._metrics, self._tracing, self._labels, context):
            with self._admitted(context) as place:
                request = await self._request(requests, context, place)
                with self._metrics.call_in_flight(self._labels[1]):
                    return await self._behaviour(request, context)

    async def stream(self, requests: Any, context: Context) -> None:
        """Handles a call with many."""
        async with Outcome(self._metrics, self._tracing, self._labels, context):
            with self._admitted(context) as place:
                request = await self._request(requests, context, place)
                with self._metrics.call_in_flight(self._labels[1]):
                    produced = self._behaviour(request, context)
                    await (produced if inspect.isawaitable(produced) else self._forward(produced, context))

    @contextmanager
    def _admitted(self, context: Context) -> Iterator[Place]:
        """Refuses a caller who may not do this, before anything that was sent is read."""
        peer = context.peer() or ""
        with self._access.admitted(
            self._method, authorization_of(context), peer, by_admin_listener=self._is_admin
        ) as grant:
            current_call().token = grant.token
            caller = caller_of(context, grant)
            CALLER.set(caller)
            with self._limit.admitted(caller) as place:
                yield place

    async def _request(self, requests: AsyncIterator[bytes], context: Context, place: Place) -> Any:
        """The message, or the messages as they come."""
        if self._streams_requests:
            return self._read_each(requests)
        async with place.request(self._patience):
            received: Any = await context.read()
        if received is grpc.aio.EOF:
            raise InvalidRequestError("request", "is missing; one message is needed")
        return self._admission.read(self._method, received, self._parse)

    async def _read_each(self, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for each in requests:
            yield self._admission.read(self._method, each, self._parse)

    async def _forward(self, messages: AsyncIterator[Any], context: Context) -> None:
        sent = self._metrics.sent.labels(*self._labels)
        try:
            async for message in messages:
                await self._write(message, context)
                sent.inc()
        finally:
            # A client that has gone leaves the generator half-way: close it now, so that its work stops now.
            close = getattr(messages, "aclose", None)
            if close is not None:
                await close()

    async def _write(self, message: Any, context: Context) -> None:
        """Returns when gRPC has room for more; by its own flow control, that of a client that reads."""
        try:
            async with asyncio.timeout(self._patience):
                await context.write(message)
        except TimeoutError:
            raise SlowReaderError(self._patience) from None


def _behaviour(handler: _Handler) -> tuple[str, _Behaviour]:
    """The handler's kind ("unary_stream", ...) and its function."""
    request = "stream" if handler.request_streaming else "unary"
    response = "stream" if handler.response_streaming else "unary"
    kind = f"{request}_{response}"
    behaviour: _Behaviour = getattr(handler, kind)
    return kind, behaviour
