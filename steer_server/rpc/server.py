"""Putting the parts on a port, and taking them off again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import grpc
import structlog
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from steering.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    operator_admin_pb2_grpc,
    operators_pb2,
    operators_pb2_grpc,
)

from steer_server.access.control import AccessControl
from steer_server.access.setup import AccessFiles, open_access
from steer_server.access.watched import watch
from steer_server.admin.operator_admin import OperatorAdmin
from steer_server.config import ServerConfig
from steer_server.engine.base import Engine
from steer_server.engine.prompts import max_prompt_bytes
from steer_server.errors import EngineDiedError, StartupError
from steer_server.lifecycle import LIVE, READY, STARTED, Lifecycle, State, tell_systemd
from steer_server.metrics import Metrics
from steer_server.metrics_http import metrics_server
from steer_server.registry import Registry
from steer_server.rpc.admission import Admission
from steer_server.rpc.call_limit import CallLimit
from steer_server.rpc.connections import count_connections, room_for_connections, watch_connections
from steer_server.rpc.interceptors import CallInterceptor
from steer_server.rpc.listener import open_listener
from steer_server.rpc.operator_admin import ADMIN_SERVICE, OperatorAdminService
from steer_server.rpc.parts import HTTP, Door, ServerParts
from steer_server.rpc.services import GenerationService, OperatorService
from steer_server.rpc.transport import channel_options
from steer_server.small_http import SmallHttp
from steer_server.tracing.base import NO_TRACING, Tracing

log = structlog.get_logger(__name__)

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    operators_pb2.DESCRIPTOR.services_by_name["OperatorService"].full_name,
)
_STATUS = health_pb2.HealthCheckResponse
_LIMITS = (
    "client_patience",
    "connection_age",
    "connection_idle",
    "grace",
    "max_arms",
    "max_artifact_bytes",
    "max_calls",
    "max_calls_per_connection",
    "max_dose",
    "max_queue",
    "max_running",
    "max_time",
    "max_tokens",
    "max_total_tokens",
    "operator_memory",
)
"""Settings that metrics show, in seconds, bytes, or numbers of things; those that are not set are left out."""
_LAST_SPANS = 2.0
"""Seconds for what has been traced to be sent."""
_LAST_WRITES = 0.2
"""Seconds for what has been answered to leave the socket."""


@dataclass(eq=False)
class SteerServer:
    """One engine, one store, one port, and what other doors there are."""

    engine: Engine
    registry: Registry
    config: ServerConfig
    doors: Sequence[Door] = ()
    access_files: AccessFiles | None = None
    """None: those of the configuration."""
    tracing: Tracing = NO_TRACING
    admin: OperatorAdmin | None = None
    """None: clients change nothing."""
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    _http: SmallHttp | None = field(default=None, init=False)

    async def start(self) -> int:
        """Binds, reports SERVING, and returns the port. Raises :class:`StartupError` when an address is taken."""
        most = room_for_connections(
            self.config.max_connections, doors=1 + bool(self.config.admin_listen) + len(self.doors)
        )
        metrics = self._metrics = Metrics(self.engine, self.registry, limits_of(self.config, most))
        services = self._services = SERVICES if self.admin is None else (*SERVICES, ADMIN_SERVICE)
        health_service = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        names = (*services, health_service, reflection.SERVICE_NAME)
        admission = Admission(
            descriptor_pool.Default(),
            names,
            self.engine.model,
            max_prompt_bytes=max_prompt_bytes(self.engine.tokenizer, self.engine.model.context_length),
            max_arms=self.config.max_arms,
        )
        calls = self._calls = CallLimit(self.config.max_calls)
        # Watching the health must not take places from texts, nor the other way round, nor from those who ask once.
        limits = defaultdict(lambda: CallLimit(most), dict.fromkeys(_methods(services), calls))
        files = self.access_files or open_access(self.config)
        access = AccessControl(files.tokens, has_admin_listener=self.config.admin_listen is not None)
        metrics.add_access(access, files.watched)
        generation = GenerationService(self.engine, self.registry, metrics, self.config, admission.limits)
        operators = OperatorService(self.registry)
        behaviours: dict[str, object] = dict(zip(SERVICES, (generation, operators), strict=True))
        self._health = health.aio.HealthServicer()
        added: list[Callable[[grpc.aio.Server], object]] = [
            partial(generation_pb2_grpc.add_GenerationServiceServicer_to_server, generation),
            partial(operators_pb2_grpc.add_OperatorServiceServicer_to_server, operators),
            partial(health_pb2_grpc.add_HealthServicer_to_server, self._health),
            partial(reflection.enable_server_reflection, names),
        ]
        if self.admin is not None:
            admin = OperatorAdminService(self.admin, patience=self.config.client_patience)
            added.append(partial(operator_admin_pb2_grpc.add_OperatorAdminServiceServicer_to_server, admin))
            behaviours[ADMIN_SERVICE] = admin
        options = channel_options(self.config, max_connections=most, max_message_bytes=admission.max_received_bytes)
        intercept = partial(CallInterceptor, metrics, admission, limits, access, tracing=self.tracing)
        self._listeners = [
            open_listener(
                address,
                intercept(patience=self.config.client_patience, is_admin=is_admin),
                options,
                added,
                files.certificates,
            )
            for address, is_admin in ((self.config.listen, False), (self.config.admin_listen, True))
            if address is not None
        ]
        if self.config.metrics_port:
            await self._serve_metrics()
        parts = ServerParts(
            self.config,
            self.engine.model,
            self.registry,
            metrics,
            access,
            files.certificates,
            admission,
            calls,
            behaviours,
            max_connections=most,
            lifecycle=self.lifecycle,
            tracing=self.tracing,
        )
        for door in self.doors:
            await door.start(parts)
        for listener in self._listeners:
            await listener.server.start()
        await self._become(State.SERVING)
        port = self._listeners[0].port
        counting, show = partial(count_connections, port), metrics.connections("grpc").set
        watching = (watch_connections(counting, most, show=show), watch(files.watched, access.look_at_clock))
        self._watching = [asyncio.ensure_future(each) for each in watching]
        return port

    async def _serve_metrics(self) -> None:
        host, port = self.config.metrics_host, self.config.metrics_port
        self._http = metrics_server(self._metrics.registry, self.lifecycle)
        try:
            await self._http.start(host, port)
        except OSError as error:
            raise StartupError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error

    async def _become(self, state: State) -> None:
        """Tells whoever asks or watches the health."""
        self.lifecycle.state = state
        for name in ("", LIVE, READY, STARTED, *self._services):
            holds = self.lifecycle.holds(name if name in (LIVE, STARTED) else READY)
            await self._health.set(name, _STATUS.SERVING if holds else _STATUS.NOT_SERVING)

    async def stop(self, state: State = State.STOPPING) -> None:
        """Reports NOT_SERVING, refuses new calls, lets running ones finish within the grace period, then ends them.

        The ports stay open until the end: who still comes is told that the server stops.
        """
        for each in self._watching:
            each.cancel()
        await self._become(state)
        # gRPC would cancel, without a reason, what comes in between the word to stop and a client's hearing of it.
        self._calls.close()
        if self.admin is not None:
            # Whoever watches one would hold up the end for nothing.
            await self.admin.builds.close()
        deadline = time.monotonic() + self.config.grace
        await self._idle_until(deadline - self.config.grace * 0.2)
        if self.admin is not None:
            await self.admin.close()
        # Jobs that outlast most of the grace period end as CANCELLED with their text, before gRPC cuts them off.
        await self.engine.close()
        await self._idle_until(deadline)
        # Calls without an end of their own (a health Watch) are not waited for.
        await asyncio.gather(
            *(listener.server.stop(_LAST_WRITES) for listener in self._listeners),
            *(door.stop(_LAST_WRITES) for door in self.doors),
        )
        await self.tracing.close(_LAST_SPANS)
        if self._http is not None:
            self._http.close()
        log.info("stopped")

    async def _idle_until(self, deadline: float) -> None:
        """Returns when no call of this contract runs, or at the deadline (in seconds of the monotonic clock)."""
        while time.monotonic() < deadline and any(self._metrics.in_flight[name] for name in (*self._services, HTTP)):
            await asyncio.sleep(0.02)

    async def serve_until_signalled(self) -> None:
        """Runs until SIGTERM or SIGINT, then stops gracefully; a second signal ends the process at once.

        Raises :class:`EngineDiedError` when the engine can decode nothing any more: a server that only refuses is
        better started anew.
        """
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _on_signal, number, stopped)
        signalled = asyncio.ensure_future(stopped.wait())
        failed = asyncio.ensure_future(self.engine.failed())
        tell_systemd("READY=1", "STATUS=serving")
        await asyncio.wait({signalled, failed}, return_when=asyncio.FIRST_COMPLETED)
        tell_systemd("STOPPING=1", "STATUS=stopping")
        if not failed.done():
            log.info("stopping", drain_delay=self.config.drain_delay, grace=self.config.grace)
            await self._become(State.STOPPING)
            # New calls are served until load balancers have heard of it.
            await asyncio.wait({failed}, timeout=self.config.drain_delay)
        if failed.done():
            signalled.cancel()
            log.error("the engine died", reason=failed.result())
            await self.stop(State.DEAD)
            raise EngineDiedError(failed.result())
        failed.cancel()
        await self.stop()


def _methods(services: Iterable[str]) -> list[str]:
    """As calls name them."""
    pool = descriptor_pool.Default()
    return [f"/{service}/{method.name}" for service in services for method in pool.FindServiceByName(service).methods]


def limits_of(config: ServerConfig, max_connections: int) -> dict[str, float]:
    """What metrics show as limits, by the name of the setting."""
    given = {name: getattr(config, name) for name in _LIMITS}
    return {name: value for name, value in given.items() if value is not None} | {"max_connections": max_connections}


def _on_signal(number: signal.Signals, stopped: asyncio.Event) -> None:
    if stopped.is_set():
        # Without a word to threads or a log, either of which may be what the first signal waits for.
        os._exit(128 + number)
    stopped.set()
