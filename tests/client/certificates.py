"""Certificates made for a test, and the files that a client is told of."""

from __future__ import annotations

from pathlib import Path

import grpc

from tests.authority import DAY, Authority


class Certificates:
    """Server certificates by what is the matter with them, and a client's: each two files in PEM."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        own, foreign = Authority(), Authority("foreign")
        self.ca, self.foreign_ca = self._write("ca", own.pem), self._write("foreign-ca", foreign.pem)
        self._made = {
            "good": own.issue(),
            "expired": own.issue(ends=-DAY),
            "early": own.issue(begins=DAY / 4, ends=DAY / 2),
            "named": own.issue(hosts=["steer.example"]),
            "client": own.issue("notebook"),
            "foreign": foreign.issue("notebook"),
        }

    def _write(self, name: str, data: bytes) -> Path:
        path = self._directory / f"{name}.pem"
        path.write_bytes(data)
        return path

    def pair(self, name: str) -> tuple[Path, Path]:
        """The files of a certificate and of its key."""
        certificate, key = self._made[name]
        return self._write(f"{name}-cert", certificate), self._write(f"{name}-key", key)

    def server(self, name: str = "good", *, asks_for_one: bool = False) -> grpc.ServerCredentials:
        """What a server with that certificate is made of."""
        certificate, key = self._made[name]
        root = self.ca.read_bytes() if asks_for_one else None
        return grpc.ssl_server_credentials([(key, certificate)], root, asks_for_one)
