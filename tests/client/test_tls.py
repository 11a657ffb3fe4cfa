"""TLS between client and server, and what is said where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from steer_client import AsyncSteerClient, InvalidRequestError, ServerUnavailableError, SteerClient, TLSError
from steer_client._cli.app import app
from steer_client._retry import Retries
from steer_client._tls import channel_credentials
from typer.testing import CliRunner

NONE = {"ca": None, "cert": None, "key": None}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("STEER_")]:
        monkeypatch.delenv(name)


def test_every_way_to_ask_goes_over_tls(certificates, tls_server, any_call, monkeypatch):
    server = tls_server(certificates.server())
    monkeypatch.setenv("STEER_CA", str(certificates.ca))
    any_call(server.target)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("certificate", "ca", "problem"),
    [
        ("good", "foreign_ca", "an authority that is not trusted here: give that authority's by ca= (--ca, STEER_CA)"),
        ("good", None, "an authority that is not trusted here: give that authority's by ca= (--ca, STEER_CA)"),
        ("expired", "ca", "has a certificate that has expired: it must be renewed there"),
        ("early", "ca", "not valid yet: compare the clocks"),
        ("named", "ca", "has a certificate for another name"),
        (None, "ca", "does not speak TLS: is this the right port?"),
    ],
)
def test_a_certificate_that_is_not_good_is_one_line_that_says_what_to_do(
    certificates, tls_server, fake, generate, monkeypatch, certificate, ca, problem
):
    server = fake if certificate is None else tls_server(certificates.server(certificate))
    monkeypatch.setenv("STEER_TLS", "1")
    if ca:
        monkeypatch.setenv("STEER_CA", str(getattr(certificates, ca)))
    with pytest.raises(TLSError) as caught:
        generate(server.target)
    said = str(caught.value)
    assert said.startswith(f"{server.target} ")
    assert problem in said
    assert "SSL" not in said
    assert "\n" not in said
    assert Retries(60, enabled=True).pause_after(caught.value) is None
    assert not server.requests


def test_a_server_with_tls_that_is_asked_without_it_hangs_up_and_the_client_says_why(
    certificates, tls_server, generate
):
    with pytest.raises(ServerUnavailableError, match=r"it hung up at once; does it speak TLS\? Then tls=True"):
        generate(tls_server(certificates.server()).target)


@pytest.mark.parametrize("shown", [None, "foreign"])
def test_a_server_that_asks_for_a_clients_certificate_answers_only_who_has_one(certificates, tls_server, shown):
    server = tls_server(certificates.server(asks_for_one=True))
    files = dict(zip(("cert", "key"), certificates.pair(shown), strict=True)) if shown else {}
    with (
        SteerClient(server.target, ca=certificates.ca, retry=False, **files) as client,
        pytest.raises(ServerUnavailableError, match=r"does it ask for a client's certificate\?.*--cert, --key"),
    ):
        client.tokenize("x")
    cert, key = certificates.pair("client")
    with SteerClient(server.target, ca=certificates.ca, cert=cert, key=str(key)) as client:
        assert client.tokenize("x").token_ids


async def test_several_servers_are_known_by_the_name_in_their_certificates(certificates, tls_server):
    pair = [tls_server(certificates.server("named")) for _ in range(2)]
    targets = [server.target for server in pair]
    many = f"ipv4:{','.join(targets)}"
    for server in pair:
        server.listed.operators.add(name="tea", digest="sha256:" + "1a2b3c4d" * 8, recommended_rule="RULE_CUMULATIVE")
        server.model.max_arms = 8
    with SteerClient(many, ca=certificates.ca, server_name="steer.example") as client:
        while not all(server.requests for server in pair):
            client.tokenize("x")
        assert len(client.sweep(["x", "y"], operators={"tea": 0.1}, targets=targets).rows) == 4
    async with AsyncSteerClient(many, ca=certificates.ca, server_name="steer.example") as client:
        assert (await client.tokenize("x")).token_ids
    with SteerClient(many, ca=certificates.ca) as client, pytest.raises(TLSError, match="--server-name"):
        client.tokenize("x")


def _refused(match, field, **given):
    with pytest.raises(InvalidRequestError, match=match) as caught:
        SteerClient("127.0.0.1:1", **given)
    assert caught.value.field == field


def test_files_that_are_not_as_they_must_be_are_named_before_anything_is_sent(certificates, tmp_path):
    cert, key = certificates.pair("client")
    _refused(r"^ca: cannot read '/no/such': No such file", "ca", ca="/no/such")
    _refused(r"^ca: .*key.pem has no certificate in PEM", "ca", ca=key)
    _refused("^key: a client's certificate needs both", "key", cert=cert)
    _refused("^cert: a client's certificate needs both", "cert", tls=True, key=key)
    _refused("are no certificate and its private key", "cert", cert=cert, key=certificates.pair("foreign")[1])
    _refused("^ca: is for TLS, which tls=False excludes", "ca", tls=False, ca=certificates.ca)
    _refused("^credentials: ", "credentials", tls=True, credentials=grpc.ssl_channel_credentials())
    (locked := tmp_path / "locked.pem").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    _refused("^key: .*locked.pem asks for a passphrase", "key", cert=cert, key=locked)
    with (sparse := tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    _refused("^ca: .*sparse' is longer than", "ca", ca=sparse)


def test_what_is_given_stands_before_the_environment(certificates, tls_server, fake, monkeypatch):
    monkeypatch.setenv("STEER_CA", "/no/such")
    with SteerClient(tls_server(certificates.server()).target, ca=certificates.ca) as client:
        client.tokenize("x")
    with SteerClient(fake.target, tls=False) as client:
        client.tokenize("x")
    monkeypatch.setenv("STEER_TLS", "no")
    assert channel_credentials(None, NONE) is None
    monkeypatch.setenv("STEER_TLS", "perhaps")
    _refused("^STEER_TLS: 'perhaps' is none of 1, true, yes, on, 0,", "tls")


def test_the_command_prints_one_line_of_what_is_wrong_with_tls(certificates, tls_server):
    server = tls_server(certificates.server())
    arguments = ["generate", "x", "--target", server.target]
    assert CliRunner().invoke(app, [*arguments, "--ca", str(certificates.ca)]).stdout == "one two\n"
    half = CliRunner().invoke(app, [*arguments, "--cert", str(certificates.ca)])
    assert (half.exit_code, half.stderr) == (2, "steer: key: a client's certificate needs both cert and key\n")
    # In a process of its own, where gRPC may write on stderr too.
    command = [str(Path(sys.executable).with_name("steer")), *arguments, "--ca", str(certificates.foreign_ca)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"steer: {server.target} has a certificate of an authority that is not trusted")
    assert done.stderr.count("\n") == 1
