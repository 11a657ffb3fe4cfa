"""Who calls: host, connection and deadline, from what gRPC knows of a call."""

from __future__ import annotations

import time
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc

from steer_server.types import Caller

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def caller_of(context: _Context) -> Caller:
    """The caller of a call. Hosts share the engine equally, and so do the connections of one host.

    Behind a proxy all callers are one host, and share its connections. Of a Unix socket nothing tells callers apart.
    """
    peer = unquote(context.peer() or "")
    # ipv4:10.0.0.1:50000, ipv6:[::1]:50000, unix:
    host = peer.rpartition(":")[0] if peer.startswith("ip") else peer
    left = context.time_remaining()
    return Caller(host, peer, None if left is None else time.monotonic() + left)
