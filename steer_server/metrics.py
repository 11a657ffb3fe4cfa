"""Prometheus metrics: what gRPC saw (``grpc_server_*``) and what steering did (``steer_*``).

Each server has a registry of its own, so several in one process do not mix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from steer_server.engine.base import Engine
from steer_server.engine.work import WorkDone
from steer_server.registry import Registry
from steer_server.types import Completion

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_DOSES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
_CALL = ("grpc_type", "grpc_service", "grpc_method")


class Metrics:
    """Counters of one server."""

    def __init__(self, engine: Engine, operators: Registry) -> None:
        registry = self.registry = CollectorRegistry()
        self.in_flight: dict[str, int] = defaultdict(int)
        """Running calls by service."""
        self.started = Counter("grpc_server_started", "RPCs started", _CALL, registry=registry)
        self.handled = Counter("grpc_server_handled", "RPCs ended, by status", (*_CALL, "grpc_code"), registry=registry)
        self.handling = Histogram(
            "grpc_server_handling_seconds", "Duration of RPCs", _CALL, buckets=_SECONDS, registry=registry
        )
        self.sent = Counter("grpc_server_msg_sent", "Messages sent on streams", _CALL, registry=registry)
        registry.register(_WorkCollector(engine.work))
        self._finished = Counter(
            "steer_completions", "Continuations finished, by reason", ("reason", "steered"), registry=registry
        )
        self._applied = Counter(
            "steer_positions_steered", "Hidden states pushed, by operator", ("operator",), registry=registry
        )
        self._dose = Histogram(
            "steer_mean_dose", "Mean relative dose of an operator", buckets=_DOSES, registry=registry
        )
        self._first_token = Histogram(
            "steer_time_to_first_token_seconds",
            "Entering the queue to first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self._queued = Histogram("steer_queue_seconds", "Time in the queue", buckets=_SECONDS, registry=registry)
        gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
            ("steer_jobs_running", "Jobs being decoded", lambda: engine.running),
            ("steer_jobs_waiting", "Jobs in the queue", lambda: engine.waiting),
            ("steer_operators", "Usable operators", lambda: _count(operators, usable=True)),
            ("steer_operators_unusable", "Operators with a problem", lambda: _count(operators, usable=False)),
        )
        for name, text, read in gauges:
            Gauge(name, text, registry=registry).set_function(read)
        for collector in engine.collectors:
            registry.register(collector)
        model = engine.model
        Info("steer_model", "The model being served", registry=registry).info(
            {"model": model.model, "engine": model.engine, "dtype": model.dtype, "fingerprint": model.model_fingerprint}
        )

    def completed(self, completion: Completion) -> None:
        """Counts a finished continuation."""
        steered = str(bool(completion.receipts)).lower()
        self._finished.labels(completion.finish_reason.value, steered).inc()
        self._queued.observe(completion.timings.queued)
        if completion.timings.time_to_first_token is not None:
            self._first_token.observe(completion.timings.time_to_first_token)
        for receipt in completion.receipts:
            positions = receipt.prompt_tokens_steered + receipt.generated_tokens_steered
            self._applied.labels(receipt.operator).inc(positions)
            if positions:
                self._dose.observe(receipt.mean_dose)

    def serve(self, host: str, port: int) -> None:
        """Exposes the metrics over HTTP. Raises :class:`OSError` when the port is taken."""
        start_http_server(port, addr=host, registry=self.registry)


class _WorkCollector(Collector):
    """Tokens as they are computed, whether or not somebody is there to get them."""

    def __init__(self, work: WorkDone) -> None:
        self._work = work

    def collect(self) -> Iterable[Metric]:
        """Read when the metrics are."""
        yield CounterMetricFamily("steer_prompt_tokens", "Prompt tokens read, once per text", self._work.prompt_tokens)
        generated = CounterMetricFamily("steer_generated_tokens", "Tokens generated", labels=["steered"])
        generated.add_metric(["false"], self._work.plain_tokens)
        generated.add_metric(["true"], self._work.steered_tokens)
        yield generated


def _count(operators: Registry, *, usable: bool) -> int:
    return sum(usable is not bool(entry.problem) for entry in operators.entries())
