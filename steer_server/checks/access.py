"""Whether the files that say who may call can be read, and say something that is accepted."""

from __future__ import annotations

from collections.abc import Iterator

from steer_server.access.setup import open_tokens
from steer_server.checks.finding import Finding
from steer_server.config import ServerConfig
from steer_server.errors import StartupError


def check_access(config: ServerConfig) -> Iterator[Finding]:
    """One finding for each file that is named."""
    try:
        if open_tokens(config) is not None:
            yield Finding("ok", "tokens", f"{config.tokens} can be read")
    except StartupError as error:
        yield Finding("problem", "tokens", str(error))
