"""Certificates made for a test, and the files that a client is told of."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import grpc
import trustme

_THEN = {"not_before": datetime(2020, 1, 1, tzinfo=UTC), "not_after": datetime(2021, 1, 1, tzinfo=UTC)}
_LATER = {"not_before": datetime(2090, 1, 1, tzinfo=UTC), "not_after": datetime(2091, 1, 1, tzinfo=UTC)}


class Certificates:
    """Server certificates by what is the matter with them, and a client's: each two files in PEM."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        own, foreign = trustme.CA(), trustme.CA()
        self.ca, self.foreign_ca = (
            self._write(name, ca.cert_pem) for name, ca in (("ca", own), ("foreign-ca", foreign))
        )
        self._made = {
            "good": own.issue_cert("127.0.0.1", "localhost"),
            "expired": own.issue_cert("127.0.0.1", **_THEN),
            "early": own.issue_cert("127.0.0.1", **_LATER),
            "named": own.issue_cert("steer.example"),
            "client": own.issue_cert("notebook@steer.example"),
            "foreign": foreign.issue_cert("notebook@steer.example"),
        }

    def _write(self, name: str, blob: trustme.Blob) -> Path:
        path = self._directory / f"{name}.pem"
        blob.write_to_path(str(path))
        return path

    def pair(self, name: str) -> tuple[Path, Path]:
        """The files of a certificate and of its key."""
        made = self._made[name]
        return self._write(f"{name}-cert", made.cert_chain_pems[0]), self._write(f"{name}-key", made.private_key_pem)

    def server(self, name: str = "good", *, asks_for_one: bool = False) -> grpc.ServerCredentials:
        """What a server with that certificate is made of."""
        cert, key = self.pair(name)
        root = self.ca.read_bytes() if asks_for_one else None
        return grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())], root, asks_for_one)
