"""Addresses that others can reach are not served without TLS and tokens."""

import pytest

from steer_server.access.addresses import check_addresses, is_loopback
from steer_server.config import ServerConfig
from steer_server.errors import StartupError

GUARDED = {"tls_cert": "cert.pem", "tls_key": "key.pem", "tokens": "tokens.toml"}


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("192.168.1.7", False),
        ("[::ffff:10.0.0.1]", False),
        ("no-such-host.invalid", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host, is_ours):
    assert is_loopback(host) is is_ours


@pytest.mark.parametrize("address", ["0.0.0.0:50051", "[::]:0", "192.0.2.1:50051"])
@pytest.mark.parametrize("name", ["listen", "admin_listen", "http_host"])
def test_a_public_address_needs_tls_and_tokens(name, address):
    given = {name: address.rpartition(":")[0] if name == "http_host" else address, "http_port": 8000}
    option = f"--{name.replace('_', '-')}"
    for missing, said in (
        (("tls_cert", "tls_key"), "--tls-cert and --tls-key are missing"),
        (("tokens",), "--tokens is missing"),
        (tuple(GUARDED), "--tls-cert, --tls-key and --tokens are missing"),
    ):
        settings = {key: value for key, value in GUARDED.items() if key not in missing}
        with pytest.raises(StartupError) as caught:
            check_addresses(ServerConfig(**given, **settings))
        assert str(caught.value).startswith(option)
        assert f" and {said}: " in str(caught.value)
        assert "--insecure serves all the same" in str(caught.value)
    check_addresses(ServerConfig(**given, **GUARDED))
    check_addresses(ServerConfig(**given, insecure=True))


def test_what_is_not_served_and_the_metrics_need_nothing():
    check_addresses(ServerConfig(http_host="0.0.0.0", metrics_host="0.0.0.0", metrics_port=9464))
