"""Whom a request is for, as far as fairness goes."""

from __future__ import annotations

from contextvars import ContextVar

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Set for each call, by what receives it; read where callers take turns. A host, with all its connections, is one."""


def host_of(peer: str) -> str:
    """Of a peer as gRPC names it ("ipv4:10.0.0.1:5123", "ipv6:[::1]:5123", "unix:"), what stays from one connection to
    the next: all but the port.
    """
    kind, _, address = peer.partition(":")
    return f"{kind}:{address.rpartition(':')[0]}" if kind in ("ipv4", "ipv6") else peer
