"""One connection: uvicorn's, with bounds on how many there are, how long they stay idle, and how long they may take."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""Seconds, seconds and probes: a client that vanished without a word is noticed, and its work stops."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Filled from the configuration."""

    patience: float
    """Seconds for the head of a request, and for what was answered to be taken."""
    idle: float
    """Seconds between two requests."""
    age: float
    """Seconds after which it takes no more requests: who comes again shows a certificate that is good then."""


class Connection(H11Protocol):
    """Closes itself where a request does not come in time; ``abort`` in the scope's state ends it at once."""

    def __init__(self, config: Config, state: ServerState, limits: ConnectionLimits) -> None:
        super().__init__(config, state, {})
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._aging: asyncio.TimerHandle | None = None
        self._head_began = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the transport."""
        super().connection_made(transport)
        _keep_alive(transport.get_extra_info("socket"))
        self.app_state = {"abort": transport.abort}
        self._end_in(self._limits.patience)
        # Closes it, or has the answer under way be its last.
        self._aging = self.loop.call_later(self._limits.age, self.shutdown)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport."""
        self._stop_timer()
        if self._aging is not None:
            self._aging.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by the transport."""
        super().data_received(data)
        if self._is_busy():
            self._stop_timer()
        elif not self._head_began:
            # However slowly the rest of the head comes.
            self._head_began = True
            self._end_in(self._limits.patience)

    def on_response_complete(self) -> None:
        """Called when an answer has been written, which its client need not have read."""
        super().on_response_complete()
        if self._is_busy():
            # The next request had come already.
            return
        self._head_began = bool(self.conn.trailing_data[0])
        is_unread = self.transport.get_write_buffer_size() > 0
        self._end_in(self._limits.patience if self._head_began or is_unread else self._limits.idle)

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _end_in(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._end)

    def _end(self) -> None:
        # Not closed: that would wait for what was written to be read.
        self.transport.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _keep_alive(of: Any) -> None:
    if of is None or of.family not in (socket.AF_INET, socket.AF_INET6):
        return
    of.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            of.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
