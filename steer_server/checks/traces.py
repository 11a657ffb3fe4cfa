"""Whether traces can be sent as the environment says."""

from __future__ import annotations

from collections.abc import Iterator

from steer_server.checks.finding import Finding
from steer_server.config import ServerConfig
from steer_server.errors import StartupError
from steer_server.tracing.export import choose_tracing


def check_traces(config: ServerConfig) -> Iterator[Finding]:
    """One finding where traces are asked for; nobody is connected to."""
    if not config.traces:
        return
    try:
        choose_tracing()
    except StartupError as error:
        yield Finding("problem", "traces", str(error))
    else:
        yield Finding("ok", "traces", "OpenTelemetry is there; whether anybody takes the spans is not looked at")
