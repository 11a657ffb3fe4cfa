"""The port of HTTP: its paths, and its beginning and end beside gRPC's."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from functools import partial

from google.protobuf import descriptor_pool
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from steer_server.errors import StartupError, UnauthenticatedError
from steer_server.http.bodies import BodyLimits
from steer_server.http.body_reader import BodyReader
from steer_server.http.connection import Connection, ConnectionLimits
from steer_server.http.contract import Method, contract_methods
from steer_server.http.endpoint import Answer, CallRules, Endpoint, Handler, Read
from steer_server.http.errors import Failure, error_body, headers_of, http_status_of
from steer_server.http.exchange import authorization_of, encode, peer_of
from steer_server.http.openai.paths import OpenAIPaths
from steer_server.http.origin import Gate
from steer_server.http.page import page_routes
from steer_server.http.refused import RefusedError
from steer_server.http_listener import HttpListener
from steer_server.lifecycle import PATHS, Lifecycle
from steer_server.metrics import OTHER
from steer_server.rpc.parts import ServerParts
from steer_server.rpc.status import reason_of
from steer_server.small_http import probe

_MAX_HEAD_BYTES = 16 << 10
_MODEL = "/steering.v1.GenerationService/GetModelInfo"
_COMPARE = "/steering.v1.GenerationService/Compare"
_OPERATORS = "/steering.v1.OperatorService/ListOperators"


class HttpDoor:
    """See :class:`steer_server.rpc.parts.Door`."""

    def __init__(self, host: str, port: int, names: Iterable[str] = ()) -> None:
        """``names``: of this machine, beside its addresses, "localhost" and ``host``."""
        self._host, self.port, self._names = host, port, (host, *names)

    async def start(self, parts: ServerParts) -> None:
        """Listens; :attr:`port` is then the one that a port of 0 came to."""
        # What clients send wrong is answered, and no line of the log each.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self.parts = parts
        self._bodies = BodyReader(BodyLimits.of(parts.admission.limits, parts.model.context_length))
        self._rules = CallRules(
            Gate(self._names),
            parts.access,
            parts.calls,
            self._bodies,
            parts.config.client_patience,
            parts.metrics,
            parts.tracing,
        )
        settings = Config(
            _application(self._rules, parts),
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            # Who calls is whom the socket names, whatever a header says.
            proxy_headers=False,
            timeout_keep_alive=int(parts.config.connection_idle) + 1,
        )
        settings.load()
        self._state = ServerState()
        settings_of = parts.config
        limits = ConnectionLimits(
            settings_of.client_patience, settings_of.connection_idle, age=settings_of.connection_age
        )
        certificates = parts.certificates
        self._listener = HttpListener(
            partial(Connection, settings, self._state, limits),
            lambda: None if certificates is None else certificates.value.context,
            lambda shaking: shaking + len(self._state.connections) < parts.max_connections,
            handshake=parts.config.client_patience,
        )
        try:
            self.port = await self._listener.start(self._host, self.port)
        except OSError as error:
            raise StartupError(f"cannot serve HTTP on {self._host}:{self.port}: {error.strerror}") from error
        parts.metrics.connections("http").set_function(lambda: len(self._state.connections))

    async def stop(self, seconds: float) -> None:
        """Takes no more connections, and ends those that there are after so many seconds for last writes."""
        self._listener.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        deadline = time.monotonic() + seconds
        while self._state.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        running = list(self._rules.running)
        for call in running:
            call.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for connection in list(self._state.connections):
            connection.transport.abort()
        self._bodies.close()


def _application(rules: CallRules, parts: ServerParts) -> Starlette:
    methods = contract_methods(parts, descriptor_pool.Default())
    routes = [
        _post(rules, f"/api/{name.rpartition('/')[2]}", name, each.handle, each.read) for name, each in methods.items()
    ]
    for path, name in {"/api/model": _MODEL, "/api/operators": _OPERATORS}.items():
        routes.append(_get(rules, path, name, partial(_empty, methods[name])))
    openai = OpenAIPaths(parts)
    routes += [
        _post(rules, "/v1/completions", _COMPARE, openai.answer, openai.read_completion),
        _post(rules, "/v1/chat/completions", _COMPARE, openai.answer, openai.read_chat),
        _get(rules, "/v1/models", _OPERATORS, openai.models),
        Route("/v1/models/{name:path}", _Named(rules, "/v1/models/NAME", openai.model), methods=["GET"]),
    ]
    routes += page_routes(rules.gate)
    routes += [Route(path, partial(_probe, parts.lifecycle, path), methods=["GET", "HEAD"]) for path in PATHS]
    app = Starlette(routes=routes, exception_handlers={404: partial(_refuse, rules), 405: partial(_refuse, rules)})
    app.router.redirect_slashes = False
    return app


async def _probe(lifecycle: Lifecycle, path: str, _request: Request) -> Response:
    """For anybody, whatever they call this host, and without a token: it says one word."""
    status, kind, body = probe(lifecycle, path)
    return Response(body, int(status.split()[0]), media_type=kind)


class _Named:
    """An ASGI application for what the path names."""

    def __init__(self, rules: CallRules, path: str, handle: Handler) -> None:
        self._rules, self._path, self._handle = rules, path, handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path_params"]["name"]
        handle = Endpoint(self._rules, self._path, _OPERATORS, lambda _: self._handle(name))
        await handle(scope, receive, send)


def _post(rules: CallRules, path: str, method: str, handle: Handler, read: Read) -> Route:
    return Route(path, Endpoint(rules, path, method, handle, read), methods=["POST"])


def _get(rules: CallRules, path: str, method: str, handle: Handler) -> Route:
    return Route(path, Endpoint(rules, path, method, handle), methods=["GET"])


async def _empty(method: Method, _: None) -> Answer:
    return await method.handle(method.read({}))


async def _refuse(rules: CallRules, request: Request, error: Exception) -> Response:
    """A path that is not there, or a method that it does not take; told to those who may call only."""
    refused: Failure
    try:
        rules.gate.check(request.headers)
        with rules.access.recognised(OTHER, authorization_of(request.scope), peer_of(request.scope)):
            refused = _not_served(request, error)
    except (RefusedError, UnauthenticatedError) as found:
        refused = found
    status, reason = http_status_of(refused), refused.code if isinstance(refused, RefusedError) else reason_of(refused)
    rules.metrics.http_requests.labels(OTHER, str(status)).inc()
    rules.metrics.errors.labels(OTHER, reason).inc()
    return Response(encode(error_body(refused)), status, dict(headers_of(refused)), media_type="application/json")


def _not_served(request: Request, error: Exception) -> RefusedError:
    status = error.status_code if isinstance(error, HTTPException) else 404
    said = "is not served here" if status == 404 else f"does not take {request.method[:32]}"
    return RefusedError(
        status,
        "NOT_FOUND" if status == 404 else "METHOD_NOT_ALLOWED",
        f"{request.url.path[:200]} {said}",
        headers=tuple(dict(getattr(error, "headers", None) or {}).items()),
    )
