"""Lines of the log of what was refused, and of calls that change the server: who, what and how it ended.

No token and nothing of a request is in them. Refusals are bounded in rate, so that no flood of them fills a disk; the
next line says how many had none. Their number is in the metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from steer_server.access.rates import Rate

log = structlog.get_logger("steer_server.audit")

_REFUSALS_PER_MINUTE = 60
_ADMIN_CALLS_PER_MINUTE = 600
"""Of their own: refusals of others never keep out the line of a call that was made."""


class AuditLog:
    """Belongs to one event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._refusals = _Lines(_REFUSALS_PER_MINUTE, clock)
        self._calls = _Lines(_ADMIN_CALLS_PER_MINUTE, clock)

    def refused(self, method: str, *, token: str, peer: str, cause: str) -> None:
        """A call was refused."""
        self._refusals.write(log.warning, action="refused", method=method, token=token, peer=peer, cause=cause)

    def called(self, method: str, *, token: str, peer: str, outcome: str) -> None:
        """A call that needs the scope admin was made."""
        self._calls.write(log.info, action="called", method=method, token=token, peer=peer, outcome=outcome)


class _Lines:
    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        self._rate, self._left_out = Rate(per_minute, clock=clock), 0

    def write(self, say: Callable[..., object], **fields: str) -> None:
        if self._rate.take(1):
            self._left_out += 1
            return
        left_out = {"left_out": self._left_out} if self._left_out else {}
        self._left_out = 0
        say("audit", **fields, **left_out)
