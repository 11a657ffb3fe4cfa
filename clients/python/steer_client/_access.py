"""How a client knows its server, and shows who it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from steer_client._call_metadata import CallMetadata
from steer_client._channel import is_local
from steer_client._errors import InsecureTokenError, InvalidRequestError
from steer_client._tls import PathLike, channel_credentials


@dataclass(frozen=True, slots=True, repr=False)
class Access:
    """What one client's connections have in common."""

    #: None: plaintext.
    credentials: grpc.ChannelCredentials | None
    #: The name in the server's certificate, where it is not the target's host.
    server_name: str | None
    metadata: CallMetadata
    insecure_token: bool

    def check(self, target: str) -> None:
        """Raises InsecureTokenError where a token would cross a network in plaintext."""
        is_readable = self.credentials is None and not is_local(target)
        if is_readable and self.metadata.has_credentials and not self.insecure_token:
            raise InsecureTokenError(
                f"token: it would go to {target} in plaintext, for all on the way to read: use TLS (tls=True, --tls), "
                "or say that the network is private (insecure_token=True, --insecure-token)",
                field="token",
            )


def access(
    credentials: grpc.ChannelCredentials | None,
    tls: bool | None,
    files: Mapping[str, PathLike | None],
    server_name: str | None,
    call: CallMetadata,
    *,
    insecure_token: bool,
) -> Access:
    """As the client's constructor is told; `files` are ca, cert and key. Raises InvalidRequestError."""
    if credentials is not None and (tls is not None or any(files.values())):
        raise InvalidRequestError("credentials: stand in place of tls, ca, cert and key", field="credentials")
    found = credentials if credentials is not None else channel_credentials(tls, files)
    return Access(found, server_name or None, call, insecure_token)
