"""Who calls: host, connection and deadline, from what gRPC knows of a call."""

from __future__ import annotations

import time
from typing import Any, TypeAlias

import grpc

from steer_server.caller import Caller, host_of

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def caller_of(context: _Context) -> Caller:
    """The caller of a call."""
    peer = context.peer() or ""
    left = context.time_remaining()
    return Caller(host_of(peer), peer, None if left is None else time.monotonic() + left)
