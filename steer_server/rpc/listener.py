"""A port of gRPC, with or without TLS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from steer_server.access.certificates import Certificates
from steer_server.access.watched import Watched
from steer_server.errors import StartupError
from steer_server.rpc.credentials import server_credentials


@dataclass(frozen=True)
class Listener:
    """Filled by :func:`open_listener`."""

    server: grpc.aio.Server
    port: int


def open_listener(
    address: str,
    interceptor: grpc.aio.ServerInterceptor,
    options: Sequence[tuple[str, Any]],
    services: Iterable[Callable[[grpc.aio.Server], object]],
    certificates: Watched[Certificates] | None,
) -> Listener:
    """Binds; nothing is served before the server is started. Raises :class:`StartupError` for an address that is taken.

    ``services``: what adds each to a server.
    """
    server = grpc.aio.server(interceptors=[interceptor], options=options)
    for add in services:
        add(server)
    try:
        if certificates is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, server_credentials(certificates))
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {address}: the port is in use, or this is no HOST:PORT of this machine"
        ) from error
    return Listener(server, int(port))
