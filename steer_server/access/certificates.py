"""The server's certificate and key, and the authority that signs those of its clients."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Certificates:
    """Of one reading of the files: they belong together. Filled by :func:`read_certificates`."""

    certificate: bytes
    """PEM: its own, and behind it those that lead to an authority."""
    key: bytes
    client_authority: bytes | None
    """None: clients show no certificate."""
    context: ssl.SSLContext
    """Of a server, for what is not gRPC."""


def read_certificates(certificate: bytes, key: bytes, client_authority: bytes | None = None) -> Certificates:
    """Raises :class:`ValueError` for what is no PEM, or a key that is not the certificate's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load(context, certificate, key)
    if client_authority is not None:
        try:
            context.load_verify_locations(cadata=client_authority.decode())
        except (ssl.SSLError, ValueError) as error:
            raise ValueError(f"the file of --tls-client-ca has no certificates in PEM: {_reason(error)}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return Certificates(certificate, key, client_authority, context)


def _load(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    # The very bytes that gRPC gets, from memory: read a second time, the files might be others.
    with _in_memory(certificate) as certificate_path, _in_memory(key) as key_path:
        try:
            context.load_cert_chain(certificate_path.path, key_path.path, password=_no_password)
        except (ssl.SSLError, ValueError) as error:
            raise ValueError(f"they are no certificate and its key, in PEM: {_reason(error)}") from None


class _in_memory:  # noqa: N801 - a with block
    """A file that is on no disk."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __enter__(self) -> _in_memory:
        self._descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
        with os.fdopen(self._descriptor, "wb", closefd=False) as file:
            file.write(self._data)
        self.path = f"/proc/self/fd/{self._descriptor}"
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _no_password() -> str:
    raise ValueError("the key is encrypted; a key without a password is accepted")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        # Without a reason: there was nothing to read.
        return error.reason.replace("_", " ").lower() if error.reason else "they are not PEM"
    return str(error)
