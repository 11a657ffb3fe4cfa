"""Whether the addresses of a configuration can be listened on."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

from steer_server.checks.finding import Finding
from steer_server.config import ServerConfig
from steer_server.errors import StartupError


def check_ports(config: ServerConfig) -> Iterator[Finding]:
    """One finding for each address."""
    taken: dict[str, str] = {}
    with ExitStack() as held:
        for option, address in addresses(config).items():
            try:
                if not address.endswith(":0") and (other := taken.setdefault(address, option)) != option:
                    raise StartupError(f"cannot listen on {address}: {other} has it ({option} takes another)")
                # Held, so that 0.0.0.0 and an address of this machine are not both free.
                held.enter_context(_bound(address, option)).listen(1)
            except StartupError as error:
                yield Finding("problem", "port", str(error))
            else:
                yield Finding("ok", "port", f"{address} is free ({option})")


def addresses(config: ServerConfig) -> dict[str, str]:
    """HOST:PORT of everything that is to listen, by the flag that names it."""
    found = {"--listen": config.listen}
    if config.admin_listen is not None:
        found["--admin-listen"] = config.admin_listen
    if config.metrics_port:
        found["--metrics-port"] = f"{config.metrics_host}:{config.metrics_port}"
    if config.http_port:
        found["--http-port"] = f"{config.http_host}:{config.http_port}"
    return found


def check_port(listen: str, option: str) -> None:
    """Raises :class:`StartupError` for a port that is taken, before the model is loaded; it is not kept bound."""
    _bound(listen, option).close()


def _bound(listen: str, option: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with ExitStack() as stack:
            probe = stack.enter_context(socket.socket(family, kind))
            # As the server sets it: a port of which only closing connections are left counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            stack.pop_all()
            return probe
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StartupError(f"cannot listen on {listen}: {reason} ({option} takes another)") from error
