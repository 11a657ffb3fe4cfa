"""From the configuration to the tokens that calls are asked for."""

from __future__ import annotations

import stat
from pathlib import Path

import structlog

from steer_server.access.token_file import TokenTable, read_tokens
from steer_server.access.watched import Watched
from steer_server.config import ServerConfig

log = structlog.get_logger(__name__)


def open_tokens(config: ServerConfig) -> Watched[TokenTable] | None:
    """The file of tokens, if there is one. Raises :class:`StartupError` where it cannot be used."""
    if config.tokens is None:
        return None
    found = Watched("tokens", [config.tokens], read_tokens)
    _warn_of_mode(config.tokens)
    return found


def _warn_of_mode(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_IWOTH or mode & stat.S_IWGRP:
        log.warning("others may write the file of tokens, and so add one", path=str(path), mode=f"{mode:04o}")
    elif mode & stat.S_IROTH:
        log.warning("everybody may read the file of tokens; chmod 600 is enough", path=str(path), mode=f"{mode:04o}")
