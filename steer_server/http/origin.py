"""Who may ask: programs, and pages of this very door.

A page of another site that a browser has open can send requests to a server on the same machine. It cannot hide its
``Origin``; and where it had its own name resolve to this machine, the ``Host`` that it sends is that name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping

from steer_server.http.refused import RefusedError

_HOST = re.compile(r"([^][:]*|\[[0-9a-f:.]*\])(:[0-9]{1,5})?")


class Gate:
    """Refuses requests that were meant for another host, or come from a page of another origin."""

    def __init__(self, names: Iterable[str]) -> None:
        """``names``: of this machine, as clients may call it, beside its addresses and "localhost"."""
        self._names = {"localhost", *(name.lower() for name in names)}

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises :class:`RefusedError`. ``headers``: by their names in lower case."""
        host = headers.get("host", "").lower()
        if not self._is_ours(_name_of(host)):
            raise RefusedError(
                403,
                "HOST_REFUSED",
                f"this server is not called {host[:100]!r}; accepted as Host: an address, localhost, and "
                "what --http-name names",
                param="Host",
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            raise RefusedError(
                403, "ORIGIN_REFUSED", f"pages of {origin[:100]!r} may not use this server", param="Origin"
            )

    def _is_ours(self, name: str) -> bool:
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _name_of(host: str) -> str:
    """A Host without its port; empty where it is none."""
    found = _HOST.fullmatch(host)
    return "" if found is None else found[1].strip("[]")
