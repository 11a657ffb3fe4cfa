"""All checks of a configuration, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from structlog.testing import capture_logs

from steer_server.checks.access import check_access
from steer_server.checks.engine import check_engine
from steer_server.checks.finding import Check, Finding
from steer_server.checks.model import check_model_and_store
from steer_server.checks.ports import check_ports
from steer_server.checks.traces import check_traces
from steer_server.config import ServerConfig

CHECKS: tuple[Check, ...] = (check_ports, check_access, check_engine, check_model_and_store, check_traces)
"""In the order of their lines; each says all that it finds, whatever the others found."""


def run_checks(config: ServerConfig) -> Iterator[Finding]:
    """The findings of all checks, and as notes what a start would warn of."""
    for check in CHECKS:
        with capture_logs() as logged:
            findings = list(check(config))
        yield from findings
        for line in logged:
            fields = ", ".join(f"{key} {value}" for key, value in line.items() if key not in ("event", "log_level"))
            yield Finding("note", findings[-1].check if findings else "log", f"{line['event']} ({fields})")
