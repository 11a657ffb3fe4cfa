"""Which addresses others can reach, and what a server needs before it listens there."""

from __future__ import annotations

import ipaddress
import socket

from steer_server.config import ServerConfig
from steer_server.errors import StartupError


def check_addresses(config: ServerConfig) -> None:
    """Raises :class:`StartupError` for an address that others can reach without TLS and tokens, unless ``insecure``.

    The metrics have no texts, and may be anywhere.
    """
    if config.insecure or (config.tls_cert is not None and config.tokens is not None):
        return
    listeners = {"--listen": config.listen}
    if config.admin_listen is not None:
        listeners["--admin-listen"] = config.admin_listen
    if config.http_port:
        listeners["--http-host"] = config.http_host
    missing = {
        (True, True): "--tls-cert, --tls-key and --tokens are missing",
        (True, False): "--tls-cert and --tls-key are missing",
        (False, True): "--tokens is missing",
    }[config.tls_cert is None, config.tokens is None]
    for option, address in listeners.items():
        host = address if option == "--http-host" else address.rpartition(":")[0]
        if not is_loopback(host):
            raise StartupError(
                f"{option} {address} can be reached by others, and {missing}: they could read what is sent, "
                "or ask for anything (--insecure serves all the same)"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name, where all that it resolves to are such."""
    name = host.strip("[]")
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name or None, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        # Listening will say that there is no such host.
        return False
    return bool(name) and all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in found)
