"""The trace that a call belongs to, where the program traces with OpenTelemetry. Without it nothing is imported."""

from __future__ import annotations

import sys


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """What tells a server of the span that is active here, such as `traceparent`; empty where there is none."""
    # A program that has no such module has no span.
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate, trace

    if not trace.get_current_span().get_span_context().is_valid:
        return ()
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((name.lower(), value) for name, value in carrier.items())
