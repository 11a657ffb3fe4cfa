"""Who calls: host, connection, deadline and authorization, from what gRPC knows of a call."""

from __future__ import annotations

import time
from typing import Any, TypeAlias

import grpc

from steer_server.access.grant import Grant
from steer_server.caller import Caller, holder_of

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def caller_of(context: _Context, grant: Grant) -> Caller:
    """The caller of a call, which may do what ``grant`` says."""
    peer = context.peer() or ""
    left = context.time_remaining()
    deadline = None if left is None else time.monotonic() + left
    return Caller(holder_of(peer, grant), peer, deadline, grant)


def authorization_of(context: _Context) -> list[str | bytes]:
    """What came under that name, once or several times."""
    return [value for name, value in context.invocation_metadata() or () if name == "authorization"]
