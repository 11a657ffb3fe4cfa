"""TLS of gRPC: each new connection gets the certificate that is there when it begins."""

from __future__ import annotations

import grpc

from steer_server.access.certificates import Certificates
from steer_server.access.watched import Watched


def server_credentials(files: Watched[Certificates]) -> grpc.ServerCredentials:
    """Of a server; clients must show a certificate where the files have an authority of theirs."""
    given = files.value

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        # Called for every handshake, in a thread of gRPC. None: as before.
        nonlocal given
        current = files.value
        if current is given:
            return None
        given = current
        return _configuration(current)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(given),
        renewed,  # type: ignore[arg-type] # its stub leaves out None
        require_client_authentication=given.client_authority is not None,
    )


def _configuration(found: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(found.key, found.certificate)], root_certificates=found.client_authority
    )
