"""Whether the files that say who may call can be read, and say something that is accepted."""

from __future__ import annotations

from collections.abc import Iterator

from steer_server.access.addresses import check_addresses
from steer_server.access.setup import open_certificates, open_tokens
from steer_server.checks.finding import Finding
from steer_server.config import ServerConfig
from steer_server.errors import StartupError


def check_access(config: ServerConfig) -> Iterator[Finding]:
    """One finding for the addresses where they are not to be served as they are, and one for the files of each kind."""
    try:
        check_addresses(config)
    except StartupError as error:
        yield Finding("problem", "access", str(error))
    try:
        if open_certificates(config) is not None:
            yield Finding("ok", "certificates", f"{config.tls_cert} and its key belong together")
    except StartupError as error:
        yield Finding("problem", "certificates", str(error))
    try:
        if open_tokens(config) is not None:
            yield Finding("ok", "tokens", f"{config.tokens} can be read")
    except StartupError as error:
        yield Finding("problem", "tokens", str(error))
