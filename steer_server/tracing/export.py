"""Where spans go: what the environment's OTEL_… say. Nothing of OpenTelemetry is imported before it is asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from steer_server.errors import StartupError

if TYPE_CHECKING:
    from steer_server.tracing.base import Tracing

_EXPORTERS = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
}


def choose_tracing() -> Callable[[str], Tracing]:
    """What begins to trace, given the name of the model. Until it is called no thread runs.

    Raises :class:`StartupError` where the packages are missing, or what the environment asks for is not there.
    """
    kind = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if kind != "otlp":
        raise StartupError(f"OTEL_TRACES_EXPORTER is {kind!r}; otlp is accepted")
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    name, protocol = next(((name, os.environ[name]) for name in names if os.environ.get(name)), (names[1], "grpc"))
    if protocol not in _EXPORTERS:
        raise StartupError(f"{name} is {protocol!r}; {' and '.join(_EXPORTERS)} are accepted")
    try:
        otel = importlib.import_module("steer_server.tracing.otel")
        exporters = importlib.import_module(_EXPORTERS[protocol])
        batches = importlib.import_module("opentelemetry.sdk.trace.export")
    except ImportError as error:
        raise StartupError(f"--traces needs {error.name}: install 'steering-operators[otel]'") from error

    def begin(model: str) -> Tracing:
        try:
            # Of a bounded queue, emptied by a thread.
            processor = batches.BatchSpanProcessor(exporters.OTLPSpanExporter())
            tracing: Tracing = otel.OtelTracing(model, processor)
        except Exception as error:
            raise StartupError(f"no traces can be sent as OTEL_… say: {error}") from error
        return tracing

    return begin
