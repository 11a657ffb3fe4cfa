"""How many calls are under way at once, and what becomes of one too many."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from steer_server.errors import QueueFullError, ShuttingDownError
from steer_server.rpc.call_record import current_call

log = structlog.get_logger(__name__)

_REPORT_SECONDS = 1.0
_HINT_SECONDS = (1.0, 4.0)
"""Drawn from, so that those who were refused together do not come back together."""


class CallLimit:
    """At most ``most`` calls at once. Belongs to one event loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._calls = 0
        self._refused = 0
        self._reporting = False
        self._is_closed = False

    @property
    def calls(self) -> int:
        """Calls under way."""
        return self._calls

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a call while the block runs.

        Raises:
            QueueFullError: it is one too many.
            ShuttingDownError: the limit was closed before.
        """
        if self._is_closed:
            raise ShuttingDownError
        if self._calls >= self._most:
            self._refuse()
            problem = f"{self._most} calls are under way already, the most admitted"
            raise QueueFullError(problem, random.uniform(*_HINT_SECONDS))  # noqa: S311 - no secret
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    def close(self) -> None:
        """Refuses all calls from here on; those under way go on."""
        self._is_closed = True

    def _refuse(self) -> None:
        # A line for each of thousands would hold up those that are admitted.
        current_call().is_refused = True
        self._refused += 1
        if not self._reporting:
            self._reporting = True
            asyncio.get_running_loop().call_later(_REPORT_SECONDS, self._report)

    def _report(self) -> None:
        log.warning("calls refused", refused=self._refused, max_calls=self._most)
        self._refused, self._reporting = 0, False
