"""What the doors of one server share: gRPC's, and others beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from steer_server.access.certificates import Certificates
from steer_server.access.control import AccessControl
from steer_server.access.watched import Watched
from steer_server.config import ServerConfig
from steer_server.lifecycle import Lifecycle
from steer_server.metrics import Metrics
from steer_server.registry import Registry
from steer_server.rpc.admission import Admission
from steer_server.rpc.call_limit import CallLimit
from steer_server.tracing.base import NO_TRACING, Tracing
from steer_server.types import ModelInfo

HTTP = "http"
"""The service of calls that do not come over gRPC, where calls in flight are counted."""


@dataclass(frozen=True)
class ServerParts:
    """Filled by ``rpc.server``."""

    config: ServerConfig
    model: ModelInfo
    registry: Registry
    metrics: Metrics
    access: AccessControl
    certificates: Watched[Certificates] | None
    """None: no TLS."""
    admission: Admission
    calls: CallLimit
    """Of the methods of this contract, whichever door they come by."""
    services: Mapping[str, Any]
    """What implements the methods of each service, by its full name."""
    max_connections: int
    """Of each door."""
    lifecycle: Lifecycle
    tracing: Tracing = NO_TRACING


class Door(Protocol):
    """Another way in. Its calls are counted in flight under :data:`HTTP`."""

    async def start(self, parts: ServerParts) -> None:
        """Listens. Raises :class:`StartupError` where that is not possible."""

    async def stop(self, seconds: float) -> None:
        """Takes no more connections, and ends those that there are after so many seconds for last writes."""
