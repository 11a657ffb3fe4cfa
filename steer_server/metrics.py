"""Prometheus metrics: what gRPC saw (``grpc_server_*``), and HTTP (``steer_http_*``), and what steering did.

Each server has a registry of its own, so several in one process do not mix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from steer_server.access.control import AccessControl
from steer_server.access.watched import Watched
from steer_server.collectors import AccessCollector, WorkCollector, build_labels, gauges, model_labels
from steer_server.engine.base import Engine
from steer_server.registry import Registry
from steer_server.types import (
    ArmEvent,
    ArmScore,
    CompareEvent,
    Completion,
    Delta,
    GenerateEvent,
    Receipt,
    ScoreEvent,
    Started,
    TextScore,
    Timings,
)

# The time at which each series was made is a series too, and nobody's question.
disable_created_metrics()  # type: ignore[no-untyped-call]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_DOSES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
_CALL = ("grpc_type", "grpc_service", "grpc_method")
_MAX_NAMES = 100
"""Operators with a series of their own; the others, should a store hold more at once, share one."""
OTHER = "other"
"""What metrics call all that has no name of its own."""


class Metrics:
    """Counters of one server."""

    def __init__(self, engine: Engine, operators: Registry, limits: Mapping[str, float] | None = None) -> None:
        """``limits``: what the server admits at most, by name."""
        registry = self.registry = CollectorRegistry()
        self._work, self._operators = engine.work, operators
        self.in_flight: dict[str, int] = defaultdict(int)
        """Calls by service whose request has arrived and whose answer is not complete."""
        self._names: set[str] = set()
        self._add_calls(registry)
        self._add_texts(registry)
        for name, text, read in gauges(engine, operators, self.in_flight):
            Gauge(name, text, registry=registry).set_function(read)
        text = "What the server admits at most, by the name of the setting"
        limit = Gauge("steer_limit", text, ("name",), registry=registry)
        for name, value in (limits or {}).items():
            limit.labels(name).set(value)
        for collector in engine.collectors:
            registry.register(collector)
        if REGISTRY not in engine.collectors:
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)
            GCCollector(registry=registry)
        Info("steer_model", "The model being served", registry=registry).info(model_labels(engine.model))
        Info("steer_build", "The versions of what runs", registry=registry).info(build_labels())
        self._connections = Gauge(
            "steer_connections",
            "Connections of clients, by door: http at once, grpc within seconds",
            ("door",),
            registry=registry,
        )

    def connections(self, door: str) -> Gauge:
        """Where a door says how many connections there are."""
        return self._connections.labels(door)

    def _add_calls(self, registry: CollectorRegistry) -> None:
        self.started = Counter("grpc_server_started", "RPCs started", _CALL, registry=registry)
        self.handled = Counter("grpc_server_handled", "RPCs ended, by status", (*_CALL, "grpc_code"), registry=registry)
        self.handling = Histogram(
            "grpc_server_handling_seconds", "Duration of RPCs", _CALL, buckets=_SECONDS, registry=registry
        )
        self.sent = Counter("grpc_server_msg_sent", "Messages sent on streams", _CALL, registry=registry)
        self.errors = Counter(
            "steer_errors",
            "RPCs that failed, by the reason in their status; over HTTP the method is the path",
            ("grpc_method", "reason"),
            registry=registry,
        )
        self.http_requests = Counter("steer_http_requests", "Requests ended", ("path", "status"), registry=registry)
        self.http_seconds = Histogram(
            "steer_http_request_seconds", "Duration of requests", ("path",), buckets=_SECONDS, registry=registry
        )

    def _add_texts(self, registry: CollectorRegistry) -> None:
        registry.register(WorkCollector(self._work))
        self._requests = Counter("steer_requests", "Requests whose decoding began", registry=registry)
        self._finished = Counter(
            "steer_completions",
            "Texts finished, by reason (SCORED: read): one for each sample of each arm of each prompt",
            ("reason", "steered"),
            registry=registry,
        )
        self._applied = Counter(
            "steer_positions_steered", "Hidden states pushed, by operator", ("operator",), registry=registry
        )
        self._dose = Histogram(
            "steer_dose_ratio",
            "Mean over a text of |change| / |hidden state|, half the strength, by operator",
            ("operator",),
            buckets=_DOSES,
            registry=registry,
        )
        self._first_token = Histogram(
            "steer_time_to_first_token_seconds",
            "Entering the queue to first token of a request",
            buckets=_SECONDS,
            registry=registry,
        )
        self._between_tokens = Histogram(
            "steer_inter_token_seconds",
            "From a token of a text to its next",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self._queued = Histogram(
            "steer_queue_seconds", "Time of a request in the queue", buckets=_SECONDS, registry=registry
        )

    @contextmanager
    def call_in_flight(self, service: str) -> Iterator[None]:
        """Counts a call while the block runs."""
        self.in_flight[service] += 1
        try:
            yield
        finally:
            self.in_flight[service] -= 1

    def add_access(self, access: AccessControl, files: Sequence[Watched[Any]]) -> None:
        """Shows what becomes of callers, and of the files that say who may do what."""
        self.registry.register(AccessCollector(access, files))

    def follow(self) -> RequestMetrics:
        """What counts one request, from its events."""
        return RequestMetrics(self)

    def name_of(self, operator: str) -> str:
        """The label of an operator."""
        if operator in self._names:
            return operator
        if len(self._names) >= _MAX_NAMES:
            self._forget_gone()
        if len(self._names) >= _MAX_NAMES:
            return OTHER
        self._names.add(operator)
        return operator

    def _forget_gone(self) -> None:
        """Ends the series of operators that are not in service any more: others need the room."""
        for name in self._names - self._operators.names():
            self._names.remove(name)
            for metric in (self._applied, self._dose):
                # It has no doses where it pushed nothing.
                with suppress(KeyError):
                    metric.remove(name)

    def prompt_read(self) -> None:
        """Counts a request whose prompt has been read by the model."""
        self._requests.inc()

    def token(self, delta: Delta) -> None:
        """Counts the time of a piece of a text."""
        if delta.seconds is not None:
            self._between_tokens.observe(delta.seconds)

    def text_finished(self, completion: Completion, *, steered: bool) -> None:
        """Counts a text."""
        self._text_ended(completion.finish_reason.value, completion.receipts, steered=steered)

    def text_scored(self, arm: ArmScore, *, steered: bool) -> None:
        """Counts a text that an arm has read."""
        self._text_ended("SCORED", arm.receipts, steered=steered)

    def _text_ended(self, reason: str, receipts: Sequence[Receipt], *, steered: bool) -> None:
        self._finished.labels(reason, _flag(steered)).inc()
        for receipt in receipts:
            operator = self.name_of(receipt.operator)
            positions = receipt.prompt_tokens_steered + receipt.generated_tokens_steered
            self._applied.labels(operator).inc(positions)
            if positions:
                self._dose.labels(operator).observe(receipt.mean_dose)

    def waited(self, timings: Timings, *, decoded: bool) -> None:
        """Counts what a request waited, by one of its texts."""
        self._queued.observe(timings.queued)
        if decoded and timings.time_to_first_token is not None:
            self._first_token.observe(timings.time_to_first_token)


class RequestMetrics:
    """Counts one request, whose texts share a prompt and a place in the queue."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._steered: dict[str, bool] = {}
        self._has_begun = self._has_waited = False

    def see(self, event: GenerateEvent | CompareEvent | ScoreEvent) -> None:
        """Takes the next event of the request."""
        arm = ""
        if isinstance(event, ArmEvent):
            arm, event = event.arm, event.event
        if isinstance(event, Started):
            self._steered[arm] = bool(event.operators)
        elif isinstance(event, Delta):
            self._begin()
            self._metrics.token(event)
        elif isinstance(event, Completion):
            self._begin()
            self._metrics.text_finished(event, steered=self._steered[arm])
            if not self._has_waited:
                self._has_waited = True
                self._metrics.waited(event.timings, decoded=True)
        elif isinstance(event, TextScore):
            self._begin()
            for scored in event.arms:
                self._metrics.text_scored(scored, steered=self._steered[scored.arm])
            self._metrics.waited(event.timings, decoded=False)

    def _begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._metrics.prompt_read()


def _flag(value: bool) -> str:
    return str(value).lower()
