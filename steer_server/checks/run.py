"""All checks of a configuration, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from steer_server.checks.engine import check_engine
from steer_server.checks.finding import Check, Finding
from steer_server.checks.model import check_model_and_store
from steer_server.checks.ports import check_ports
from steer_server.config import ServerConfig

CHECKS: tuple[Check, ...] = (check_ports, check_engine, check_model_and_store)
"""In the order of their lines; each says all that it finds, whatever the others found."""


def run_checks(config: ServerConfig) -> Iterator[Finding]:
    """The findings of all checks."""
    for check in CHECKS:
        yield from check(config)
