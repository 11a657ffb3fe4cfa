"""Certificates for tests: an authority, and what it signs."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


class Authority:
    """Signs certificates for 127.0.0.1, and for clients."""

    def __init__(self, name: str = "authority") -> None:
        self._key, self._name = ec.generate_private_key(ec.SECP256R1()), _name(name)
        made = self._builder(self._name, self._key.public_key(), datetime.now(UTC) + DAY)
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.pem = made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue(
        self, name: str = "server", *, ends: timedelta = DAY, password: bytes | None = None
    ) -> tuple[bytes, bytes]:
        """A certificate and its key, in PEM; it ends so long from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("localhost")])
        made = self._builder(_name(name), key.public_key(), datetime.now(UTC) + ends).add_extension(names, False)
        certificate = made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        locked: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if password is not None:
            locked = serialization.BestAvailableEncryption(password)
        return certificate, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, end: datetime) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - 2 * DAY)
            .not_valid_after(end)
        )

    def context(self, shown: tuple[bytes, bytes] | None, directory: Path) -> ssl.SSLContext:
        """Of a client that trusts this authority, and shows a certificate where it has one."""
        made = ssl.create_default_context(cadata=self.pem.decode())
        if shown is not None:
            for name, data in zip(("client.pem", "client.key"), shown, strict=True):
                (directory / name).write_bytes(data)
            made.load_cert_chain(directory / "client.pem", directory / "client.key")
        return made

    def channel(self, target: str, shown: tuple[bytes, bytes] | None) -> grpc.aio.Channel:
        """Of such a client, over gRPC."""
        certificate, key = shown or (None, None)
        credentials = grpc.ssl_channel_credentials(self.pem, key, certificate)
        return grpc.aio.secure_channel(target, credentials, [("grpc.use_local_subchannel_pool", 1)])
