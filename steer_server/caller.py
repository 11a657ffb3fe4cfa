"""Whom a request is for: how fairness counts it, and what it may do."""

from __future__ import annotations

import ipaddress
from contextvars import ContextVar
from dataclasses import dataclass
from urllib.parse import unquote

from steer_server.access.grant import EVERYTHING, Grant

_IPV6_NETWORK_BITS = 64
"""Of an address of IPv6: the rest is chosen by whoever is in that network, as often as they like."""


@dataclass(frozen=True)
class Caller:
    """Who waits for an answer. Filled by ``rpc``.

    Hosts take turns, and of each host its connections: neither many connections nor many requests get more than one.
    Behind a proxy all callers are one host that shares the proxy's connections; a Unix socket tells nobody apart.
    Who has a token is the token's, from whatever host: see :func:`holder_of`.
    """

    host: str = ""
    connection: str = ""
    deadline: float | None = None
    """When the call ends whatever happens, in seconds of the monotonic clock."""
    grant: Grant = EVERYTHING
    """What the call may do."""

    @property
    def client(self) -> tuple[str, str]:
        """What is told from other clients."""
        return self.host, self.connection


CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039 - frozen
"""Set for each call, by what receives it; read where callers take turns."""


def holder_of(peer: str, grant: Grant) -> str:
    """The :attr:`Caller.host` of a call: the token where there is one, else the host."""
    return f"token:{grant.token}" if grant.token else host_of(peer)


def host_of(peer: str) -> str:
    """Of a peer as gRPC names it ("ipv4:10.0.0.1:5123", "ipv6:[::1]:5123", "unix:"), what stays from one connection to
    the next: all but the port, and of IPv6 the network, which has addresses without number.
    """
    kind, _, address = peer.partition(":")
    host = address.rpartition(":")[0]
    if kind == "ipv6":
        return f"ipv6:{_network(unquote(host).strip('[]'))}"
    return f"ipv4:{host}" if kind == "ipv4" else peer


def _network(host: str) -> str:
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address.packed, _IPV6_NETWORK_BITS), strict=False))
