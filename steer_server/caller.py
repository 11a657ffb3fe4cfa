"""Whom a request is for, as far as fairness goes."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """Who waits for an answer. Filled by ``rpc``.

    Hosts take turns, and of each host its connections: neither many connections nor many requests get more than one.
    Behind a proxy all callers are one host that shares the proxy's connections; a Unix socket tells nobody apart.
    """

    host: str = ""
    connection: str = ""
    deadline: float | None = None
    """When the call ends whatever happens, in seconds of the monotonic clock."""

    @property
    def client(self) -> tuple[str, str]:
        """What is told from other clients."""
        return self.host, self.connection


CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039 - frozen
"""Set for each call, by what receives it; read where callers take turns."""


def host_of(peer: str) -> str:
    """Of a peer as gRPC names it ("ipv4:10.0.0.1:5123", "ipv6:[::1]:5123", "unix:"), what stays from one connection to
    the next: all but the port.
    """
    kind, _, address = peer.partition(":")
    return f"{kind}:{address.rpartition(':')[0]}" if kind in ("ipv4", "ipv6") else peer
