"""From the configuration to what is asked of callers, checked before anything is served."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from steer_server.access.addresses import check_addresses
from steer_server.access.certificates import Certificates, read_certificates
from steer_server.access.token_file import TokenTable, read_tokens
from steer_server.access.watched import Watched
from steer_server.config import ServerConfig
from steer_server.errors import StartupError

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class AccessFiles:
    """Filled by :func:`open_access`. None: not asked for."""

    tokens: Watched[TokenTable] | None = None
    certificates: Watched[Certificates] | None = None

    @property
    def watched(self) -> Sequence[Watched[Any]]:
        """Those that there are."""
        return [each for each in (self.tokens, self.certificates) if each is not None]


def open_access(config: ServerConfig) -> AccessFiles:
    """Reads the files of tokens and certificates.

    Raises :class:`StartupError` for one that cannot be used, and for an address that is not to be served as it is.
    """
    check_addresses(config)
    return AccessFiles(open_tokens(config), open_certificates(config))


def open_tokens(config: ServerConfig) -> Watched[TokenTable] | None:
    """See :func:`open_access`."""
    if config.tokens is None:
        return None
    found = Watched("tokens", [config.tokens], read_tokens)
    mode = _mode(config.tokens)
    if mode & (stat.S_IWOTH | stat.S_IWGRP):
        log.warning("others may write the tokens' file, and so add one", path=str(config.tokens), mode=f"{mode:04o}")
    elif mode & stat.S_IROTH:
        log.warning("everybody may read the tokens' file; chmod 600 is enough", path=str(config.tokens))
    return found


def open_certificates(config: ServerConfig) -> Watched[Certificates] | None:
    """See :func:`open_access`."""
    certificate, key, authority = config.tls_cert, config.tls_key, config.tls_client_ca
    if certificate is None or key is None:
        for option, value in (("--tls-cert", certificate), ("--tls-key", key), ("--tls-client-ca", authority)):
            if value is not None:
                raise StartupError(f"{option} {value} is given without both of --tls-cert and --tls-key")
        return None
    paths = [certificate, key] if authority is None else [certificate, key, authority]
    found = Watched("certificates", paths, read_certificates)
    if _mode(key) & stat.S_IROTH:
        log.warning("everybody may read the server's key; chmod 600 is enough", path=str(key))
    return found


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
