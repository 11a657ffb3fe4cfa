"""What a server says of its state: to load balancers by three probes, and to systemd."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """In the order in which a server goes through them."""

    LOADING = "loading"
    SERVING = "serving"
    STOPPING = "stopping"
    DEAD = "dead"
    """The engine can decode nothing any more; the process is about to end."""


LIVE, READY, STARTED = "live", "ready", "started"
"""The probes, as the health service names them beside the services themselves and "" (which are ready when it is)."""
PATHS = {"/livez": LIVE, "/readyz": READY, "/startedz": STARTED, "/healthz": READY}
"""The probes over HTTP."""


@dataclass
class Lifecycle:
    """The state of one server. Belongs to one event loop."""

    state: State = State.LOADING

    def holds(self, probe: str) -> bool:
        """Whether a probe is passed.

        live: the process need not be ended. started: it has loaded, and served. ready: it wants new calls.
        """
        if probe == LIVE:
            return self.state is not State.DEAD
        return self.state is State.SERVING or (probe == STARTED and self.state is State.STOPPING)


def tell_systemd(*lines: str) -> None:
    """Sends lines such as ``READY=1`` to systemd, where it has asked for them (``Type=notify``); else does nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        # An address that begins with @ is in the abstract namespace, whose names begin with a zero byte.
        where = f"\0{address[1:]}" if address.startswith("@") else address
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.sendto("\n".join(lines).encode(), where)
