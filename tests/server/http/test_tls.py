"""TLS on both doors: who shows no certificate, an expired one or the right one; and certificates that are renewed."""

import asyncio
import ssl
import time
from datetime import timedelta

import grpc
import pytest
from cryptography import x509
from steering.v1 import generation_pb2 as pb

from steer_server.access.scopes import RPC_SCOPES, SCOPES
from steer_server.errors import StartupError
from tests.authority import Authority
from tests.server.http.conftest import read_answer
from tests.server.http.test_who_may_call import bearer, call, entry, http_paths, token_of

MODEL = "/steering.v1.GenerationService/GetModelInfo"


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def files(authority, tmp_path):
    """The files of a server: certificate and key, the authority of clients, tokens."""
    made = {name: tmp_path / name for name in ("tls_cert", "tls_key", "tls_client_ca", "tokens")}
    certificate, key = authority.issue()
    made["tls_cert"].write_bytes(certificate)
    made["tls_key"].write_bytes(key)
    made["tls_client_ca"].write_bytes(authority.pem)
    made["tokens"].write_text("".join(entry(scope, [scope]) for scope in SCOPES))
    return made


def without(files, *names):
    return {name: path for name, path in files.items() if name not in names}


async def ask(server, path, headers):
    """The status of an answer over HTTP; None where the connection was not accepted."""
    verb = "GET" if path in ("/api/model", "/api/operators") or path.startswith("/v1/models") else "POST"
    try:
        return (await server.ask(verb, path, {} if verb == "POST" else None, **headers)).status
    except (OSError, EOFError):
        return None


@pytest.mark.parametrize("shown", ["no certificate", "an expired one", "one of another authority", "the right one"])
async def test_under_mutual_tls_a_call_needs_a_certificate_before_anything_else(
    start, authority, files, tmp_path, shown
):
    certificate = {
        "no certificate": None,
        "an expired one": authority.issue("client", ends=-timedelta(days=1)),
        "one of another authority": Authority("other").issue("client"),
        "the right one": authority.issue("client"),
    }[shown]
    server = await start(**files, operator_admin=True)
    server.tls = authority.context(certificate, tmp_path)
    async with authority.channel(server.target, certificate) as channel:
        for path, scope in RPC_SCOPES.items():
            token = token_of(scope if scope in SCOPES else "read")
            code, words = await call(channel, path, b"", token)
            if shown == "the right one":
                assert code not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED), (path, words)
                assert code is not grpc.StatusCode.UNAVAILABLE, (path, words)
            else:
                assert code is grpc.StatusCode.UNAVAILABLE, (path, words)
        if shown == "the right one":
            assert (await call(channel, MODEL, b"", None))[0] is grpc.StatusCode.UNAUTHENTICATED
    for path, method in http_paths().items():
        status = await ask(server, path, bearer(token_of(RPC_SCOPES[method])))
        assert (status is not None and status not in (401, 403)) == (shown == "the right one"), path
        assert (status is None) == (shown != "the right one"), path
    if shown == "the right one":
        assert await ask(server, "/api/model", {}) == 401


async def test_tls_alone_asks_clients_for_no_certificate(start, authority, files, tmp_path):
    server = await start(**without(files, "tls_client_ca"))
    server.tls = authority.context(None, tmp_path)
    async with authority.channel(server.target, None) as channel:
        assert (await call(channel, MODEL, b"", token_of("read")))[0] is grpc.StatusCode.OK
        assert (await call(channel, MODEL, b"", None))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert await ask(server, "/api/model", bearer(token_of("read"))) == 200
    assert (await server.get("/")).status == 200


async def test_who_speaks_no_tls_or_an_old_one_is_not_heard_and_harms_nobody(start, authority, files, tmp_path):
    server = await start(**without(files, "tls_client_ca"))
    async with grpc.aio.insecure_channel(server.target) as channel:
        assert (await call(channel, MODEL, b"", token_of("read")))[0] is grpc.StatusCode.UNAVAILABLE
    assert await ask(server, "/api/model", bearer(token_of("read"))) is None
    old = authority.context(None, tmp_path)
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    for port in (server.port, int(server.target.rpartition(":")[2])):
        with pytest.raises(OSError):  # noqa: PT011 - whatever the two sides make of it
            await asyncio.open_connection("127.0.0.1", port, ssl=old)
    server.tls = authority.context(None, tmp_path)
    assert await ask(server, "/api/model", bearer(token_of("read"))) == 200


async def serial(port, context):
    """Of the certificate that a new connection gets."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(found).serial_number


async def test_a_renewed_certificate_is_shown_within_a_second_and_no_connection_is_lost(
    start, authority, files, tmp_path
):
    server = await start(**without(files, "tls_client_ca"))
    context = authority.context(None, tmp_path)
    ports = (server.port, int(server.target.rpartition(":")[2]))
    before = [await serial(port, context) for port in ports]
    server.engine.may_go_on.clear()
    async with authority.channel(server.target, None) as channel:
        stream = channel.unary_stream("/steering.v1.GenerationService/GenerateStream")(
            pb.GenerateRequest(prompt={"text": "x"}).SerializeToString(),
            metadata=tuple(bearer(token_of("generate")).items()),
        )
        assert pb.GenerateEvent.FromString(await stream.read()).HasField("started")
        certificate, key = authority.issue()
        files["tls_cert"].write_bytes(certificate)
        await asyncio.sleep(0.7)
        # The key has not come yet: the old pair stays, and the metrics say so.
        assert [await serial(port, context) for port in ports] == before
        metrics = server.server._metrics.registry
        assert metrics.get_sample_value("steer_access_file_problem", {"file": "certificates"}) == 1
        files["tls_key"].write_bytes(key)
        began = time.monotonic()
        wanted = x509.load_pem_x509_certificate(certificate).serial_number
        while [await serial(port, context) for port in ports] != [wanted, wanted]:
            await asyncio.sleep(0.01)
        assert time.monotonic() - began < 1.0
        assert metrics.get_sample_value("steer_access_file_problem", {"file": "certificates"}) == 0
        server.engine.may_go_on.set()
        last = None
        while (data := await stream.read()) is not grpc.aio.EOF:
            last = pb.GenerateEvent.FromString(data)
        assert last.finished.text == "a secret \u2603"


async def test_clients_of_an_authority_that_was_replaced_are_refused(start, authority, files, tmp_path):
    server, new, mine = await start(**files), Authority("new"), authority.issue("client")
    server.tls = authority.context(mine, tmp_path)
    assert await ask(server, "/api/model", bearer(token_of("read"))) == 200
    files["tls_client_ca"].write_bytes(new.pem)
    await asyncio.sleep(0.7)
    assert await ask(server, "/api/model", bearer(token_of("read"))) is None
    async with authority.channel(server.target, mine) as channel:
        assert (await call(channel, MODEL, b"", token_of("read")))[0] is grpc.StatusCode.UNAVAILABLE
    server.tls = authority.context(new.issue("client"), tmp_path)
    assert await ask(server, "/api/model", bearer(token_of("read"))) == 200


async def test_connections_that_never_shake_hands_are_bounded_and_end(start, authority, files, tmp_path):
    server = await start(**without(files, "tls_client_ca"), max_connections=8, client_patience=0.5)
    silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(12)]
    began = time.monotonic()
    ends = [await asyncio.wait_for(reader.read(), 5) for reader, _ in silent[8:]]
    assert ends == [b""] * 4
    assert time.monotonic() - began < 0.4
    # The others are given up after the time that a client may take.
    await asyncio.gather(*(asyncio.wait_for(reader.read(), 5) for reader, _ in silent), return_exceptions=True)
    server.tls = authority.context(None, tmp_path)
    assert await ask(server, "/api/model", bearer(token_of("read"))) == 200
    for _, writer in silent:
        writer.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tls_key": None}, "--tls-cert .* is given without both of --tls-cert and --tls-key"),
        ({"tls_cert": None, "tls_key": None}, "--tls-client-ca .* is given without both"),
        ({"tls_key": b"x"}, "no certificate and its key"),
        ({"tls_key": "other"}, "key values mismatch"),
        ({"tls_key": "encrypted"}, "the key is encrypted"),
        ({"tls_client_ca": b"x"}, "the file of --tls-client-ca has no certificates in PEM"),
        ({"tokens": b"x"}, "tokens .* cannot be used: is not TOML"),
    ],
)
async def test_files_that_do_not_belong_together_are_an_error_at_the_start(start, authority, files, change, said):
    for name, value in change.items():
        if value == "other":
            files[name].write_bytes(authority.issue()[1])
        elif value == "encrypted":
            files[name].write_bytes(authority.issue(password=b"secret")[1])
        elif value is not None:
            files[name].write_bytes(value)
    with pytest.raises(StartupError, match=said):
        await start(**without(files, *(name for name, value in change.items() if value is None)))


async def test_a_connection_takes_no_calls_beyond_its_age(start, authority, files, tmp_path):
    server = await start(**files, connection_age=0.6)
    server.tls = authority.context(authority.issue("client"), tmp_path)
    reader, writer = await server.open()
    request = server.request("GET", "/api/model", connection="keep-alive", **bearer(token_of("read")))
    for _ in range(2):
        writer.write(request)
        assert (await read_answer(reader)).status == 200
    # Whoever comes again shows a certificate that is good by then.
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
