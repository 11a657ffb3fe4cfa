"""One path of the door: its requests are limited, read, answered, booked and logged as calls over gRPC are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog
from starlette.types import Receive, Scope, Send

from steer_server.access.control import AccessControl
from steer_server.caller import CALLER
from steer_server.errors import ACCESS_ERRORS, EngineFailedError, SlowReaderError, SteerServerError
from steer_server.http.body_reader import BodyReader
from steer_server.http.errors import CLIENT_LEFT, Failure, error_body, headers_of, http_status_of
from steer_server.http.exchange import ClientLeftError, Exchange, event
from steer_server.http.origin import Gate
from steer_server.http.refused import RefusedError
from steer_server.metrics import Metrics
from steer_server.rpc.call_limit import CallLimit, Place
from steer_server.rpc.call_record import CURRENT, CallRecord, current_call
from steer_server.rpc.outcome import problem_fields
from steer_server.rpc.parts import HTTP
from steer_server.rpc.status import code_of
from steer_server.tracing import names
from steer_server.tracing.base import NO_TRACING, Ending, Tracing

log = structlog.get_logger(__name__)

_SERVER_ERROR = 500


@dataclass(frozen=True)
class Events:
    """An answer that is a stream of events, already on their way to bytes."""

    events: AsyncGenerator[bytes, None]
    headers: tuple[tuple[str, str], ...] = ()
    last: bytes = b""
    """Behind a stream that ended well."""
    failed: Callable[[Failure], bytes] = lambda error: event(error_body(error), "error")
    """The last event of one that did not."""


@dataclass(frozen=True)
class Value:
    """An answer that is one JSON value."""

    body: Any
    headers: tuple[tuple[str, str], ...] = ()


Answer = Events | Value
Handler = Callable[[Any], Awaitable[Answer]]
"""Given what was read of the body, None where there is none; raises any :class:`SteerServerError` or
:class:`RefusedError`.
"""
Read = Callable[[Any], Any]
"""Makes of a body, a JSON object, what a handler is given; raises as a handler does. Called in any thread."""


@dataclass(frozen=True)
class CallRules:
    """What holds for every path of one door."""

    gate: Gate
    access: AccessControl
    limit: CallLimit
    bodies: BodyReader
    patience: float
    metrics: Metrics
    tracing: Tracing = NO_TRACING
    running: set[asyncio.Task[Any]] = field(default_factory=set)
    """Calls under way: what a stopping server ends."""


class Endpoint:
    """An ASGI application for one path."""

    def __init__(self, rules: CallRules, path: str, method: str, handle: Handler, read: Read | None = None) -> None:
        """``path``: as metrics and the log name it. ``method``: of the contract, whose scope a caller needs.

        ``read``: what reads the body; None where there is none.
        """
        self._rules, self._path, self._method = rules, path, method
        self._handle, self._read = handle, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        exchange = Exchange(scope, receive, send, patience=self._rules.patience)
        record, began = CallRecord(), time.monotonic()
        CURRENT.set(record)
        method = scope["method"]
        attributes = {names.HTTP_METHOD: method, names.HTTP_ROUTE: self._path}
        record.trace = self._rules.tracing.begin(f"{method} {self._path}", attributes, exchange.headers.items)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for mypy
        self._rules.running.add(task)
        failure: BaseException | None = None
        try:
            failure = await self._serve(exchange)
        except asyncio.CancelledError as error:
            failure = error
            exchange.abort()
        finally:
            self._rules.running.discard(task)
            self._book(exchange, record, failure, time.monotonic() - began)

    async def _serve(self, exchange: Exchange) -> Exception | None:
        """The failure, of which the client has been told where it could be."""
        try:
            await self._answer(exchange)
        except ClientLeftError as error:
            return error
        except (SteerServerError, RefusedError) as error:
            return await self._tell(exchange, error)
        except Exception as error:
            log.exception("call failed", path=self._path, exc_info=error)
            return await self._tell(exchange, EngineFailedError(f"unexpected {type(error).__name__} in the server"))
        return None

    async def _answer(self, exchange: Exchange) -> None:
        self._rules.gate.check(exchange.headers)
        with self._admitted(exchange) as place:
            asked = None if self._read is None else await self._asked(exchange, place, self._read)
            with self._rules.metrics.call_in_flight(HTTP):
                async with exchange.while_connected():
                    answer = await self._handle(asked)
                    if isinstance(answer, Events):
                        exchange.failed = answer.failed
                        async with aclosing(answer.events) as events:
                            await exchange.stream(events, answer.headers)
                if isinstance(answer, Events):
                    await exchange.end(answer.last)
                else:
                    await exchange.answer(answer.body, headers=answer.headers)

    async def _asked(self, exchange: Exchange, place: Place, read: Read) -> Any:
        bodies = self._rules.bodies
        with bodies.room.held() as room:
            async with place.request(self._rules.patience):
                data = await exchange.read(bodies.limits.max_bytes, room)
            with self._rules.metrics.call_in_flight(HTTP):
                async with exchange.while_connected():
                    return await bodies.read(data, read)

    @contextmanager
    def _admitted(self, exchange: Exchange) -> Iterator[Place]:
        """Refuses a caller who may not do this, before the body is read."""
        with self._rules.access.admitted(self._method, exchange.authorization, exchange.peer) as grant:
            current_call().token = grant.token
            caller = exchange.caller(grant)
            CALLER.set(caller)
            with self._rules.limit.admitted(caller) as place:
                yield place

    async def _tell(self, exchange: Exchange, error: Failure) -> Failure:
        # There is no room to tell it in what the client does not read.
        if not isinstance(error, SlowReaderError):
            try:
                if exchange.has_begun:
                    await exchange.end(exchange.failed(error))
                else:
                    await exchange.answer(error_body(error), http_status_of(error), headers_of(error))
                return error
            except SlowReaderError as slow:
                error = slow
        exchange.abort()
        return error

    def _book(self, exchange: Exchange, record: CallRecord, failure: BaseException | None, seconds: float) -> None:
        metrics, status = self._rules.metrics, _status(failure)
        metrics.http_requests.labels(self._path, str(status)).inc()
        metrics.http_seconds.labels(self._path).observe(seconds)
        said = problem_fields(failure)
        if isinstance(failure, RefusedError):
            said = {"reason": failure.code}
        if said:
            metrics.errors.labels(self._path, said["reason"]).inc()
        record.trace.end(_ending(status, failure, said))
        if record.is_refused or isinstance(failure, ACCESS_ERRORS):
            return
        level = "info" if failure is None else "warning"
        fields = {"status": status, "code": _code(failure), "seconds": round(seconds, 3), "peer": exchange.peer}
        getattr(log, level)(self._path, **fields, **record.fields(), **said)


def _ending(status: int, failure: BaseException | None, said: Mapping[str, str]) -> Ending:
    return Ending(
        {names.HTTP_STATUS: status},
        error_type=said.get("reason", "" if failure is None else _code(failure)),
        problem=said.get("problem", ""),
        is_fault=status >= _SERVER_ERROR,
    )


def _status(failure: BaseException | None) -> int:
    if isinstance(failure, SteerServerError | RefusedError):
        return http_status_of(failure)
    return 200 if failure is None else CLIENT_LEFT


def _code(failure: BaseException | None) -> str:
    """Of gRPC, where it has one."""
    if isinstance(failure, SteerServerError):
        return code_of(failure).name
    if isinstance(failure, RefusedError):
        return failure.code
    return "OK" if failure is None else "CANCELLED"
