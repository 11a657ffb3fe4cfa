"""Every RPC with every kind of token, over gRPC and over HTTP: served or refused, before a message is read."""

import asyncio
import json
import socket
from hashlib import sha256

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2

from steer_server.access.scopes import RPC_SCOPES, SCOPES
from steer_server.rpc.server import ADMIN_SERVICE, SERVICES

REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
PATHS = {
    "/v1/models": "/steering.v1.OperatorService/ListOperators",
    "/v1/models/x": "/steering.v1.OperatorService/ListOperators",
    "/v1/completions": "/steering.v1.GenerationService/Compare",
    "/v1/chat/completions": "/steering.v1.GenerationService/Compare",
    "/api/model": "/steering.v1.GenerationService/GetModelInfo",
    "/api/operators": "/steering.v1.OperatorService/ListOperators",
}
# Bytes that are no message of anything: a refusal that comes before they are read does not name them.
NO_MESSAGE = b"\xff\xff\xff\xff"


def token_of(name: str) -> str:
    return f"steer_{name:x<43}"


def entry(name: str, scopes, more: str = "") -> str:
    listed = ", ".join(f'"{scope}"' for scope in scopes)
    return f'[tokens.{name}]\nsha256 = "{sha256(token_of(name).encode()).hexdigest()}"\nscopes = [{listed}]\n{more}\n'


def everybody() -> str:
    right = [entry(scope, [scope]) for scope in SCOPES]
    return "".join([*right, *(entry(f"old-{scope}", [scope], "expires = 2020-01-01T00:00:00Z") for scope in SCOPES)])


@pytest.fixture
async def guarded(start, tmp_path):
    """A server that asks for tokens."""
    path = tmp_path / "tokens.toml"
    path.write_text(everybody())
    made = await start(tokens=path, operator_admin=True)
    made.tokens = path
    return made


def bearer(token: str | None) -> dict[str, str]:
    return {} if token is None else {"authorization": f"Bearer {token}"}


def cases(scope: str):
    """Each kind of token, and the code that refuses it; None where its scope decides."""
    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
    yield "no token", None, unauthenticated
    yield "wrong token", token_of("wrong"), unauthenticated
    yield "expired token", token_of(f"old-{scope}"), unauthenticated
    yield "right token", token_of(scope), None


def methods():
    """Every method that the contract and the standard services have: its path and descriptor."""
    pool = descriptor_pool.Default()
    names = (*SERVICES, ADMIN_SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
    return {f"/{name}/{each.name}": each for name in names for each in pool.FindServiceByName(name).methods}


def http_paths():
    """Every path over HTTP, and the method whose scope it needs."""
    ours = [path for path, each in methods().items() if path.startswith("/steering.") and not each.client_streaming]
    return PATHS | {f"/api/{path.rpartition('/')[2]}": path for path in ours}


async def call(channel, path, data: bytes, token: str | None):
    """The code and the words of a call's end; of a stream that begins, those of its beginning."""
    method, metadata = methods()[path], tuple(bearer(token).items())
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    made = getattr(channel, kind)(path)
    request = (each for each in [data]) if method.client_streaming else data
    started = made(request, metadata=metadata, timeout=20)
    try:
        if method.server_streaming:
            await started.read()
            if not started.done():
                return grpc.StatusCode.OK, ""
        else:
            await started
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    finally:
        started.cancel()
    return grpc.StatusCode.OK, ""


def expected(path: str, scope: str, code):
    needed = RPC_SCOPES[path]
    if needed == "open":
        return None
    if code is not None:
        return code
    return None if needed == scope else grpc.StatusCode.PERMISSION_DENIED


async def test_the_table_has_every_method_that_is_served_and_no_other(guarded):
    async with grpc.aio.insecure_channel(guarded.target) as channel:
        call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stream = call(iter([request.SerializeToString()]), metadata=tuple(bearer(token_of("read")).items()))
        listed = reflection_pb2.ServerReflectionResponse.FromString(await stream.read()).list_services_response
    pool = descriptor_pool.Default()
    served = {
        f"/{service.name}/{method.name}"
        for service in listed.service
        for method in pool.FindServiceByName(service.name).methods
    }
    assert served == set(RPC_SCOPES) == set(methods())


def test_what_changes_the_server_needs_the_scope_admin():
    changes = {path for path in RPC_SCOPES if "Admin" in path or "Reload" in path}
    assert {path for path, scope in RPC_SCOPES.items() if scope == "admin"} == changes
    assert {path for path, scope in RPC_SCOPES.items() if scope == "open"} == {
        path for path in RPC_SCOPES if path.startswith("/grpc.health.")
    }


@pytest.mark.parametrize("scope", SCOPES)
async def test_over_grpc_each_call_is_served_or_refused_by_its_token(guarded, scope):
    async with grpc.aio.insecure_channel(guarded.target) as channel:
        for path in RPC_SCOPES:
            for kind, token, refusal in cases(scope):
                code, words = await call(channel, path, NO_MESSAGE, token)
                wanted = expected(path, scope, refusal)
                if wanted is None:
                    assert code not in REFUSED, (path, kind)
                else:
                    assert code is wanted, (path, kind, words)
                    # The message was never looked at.
                    assert "Request" not in words, (path, kind)
    assert guarded.engine.jobs == []


@pytest.mark.parametrize("scope", SCOPES)
async def test_over_http_each_call_is_served_or_refused_by_its_token(guarded, scope):
    for path, method in http_paths().items():
        verb = "GET" if path in ("/api/model", "/api/operators") or path.startswith("/v1/models") else "POST"
        for kind, token, refusal in cases(scope):
            answer = await guarded.ask(verb, path, b"{no json" if verb == "POST" else None, **bearer(token))
            wanted = expected(method, scope, refusal)
            if wanted is None:
                assert answer.status not in (401, 403), (path, kind)
                continue
            assert answer.error["status"] == wanted.name, (path, kind)
            assert answer.status == (401 if wanted is grpc.StatusCode.UNAUTHENTICATED else 403)
            assert answer.headers.get("www-authenticate") == ("Bearer" if answer.status == 401 else None)
            assert "JSON" not in answer.error["message"]
    assert guarded.engine.jobs == []


async def test_the_page_is_for_everybody_and_what_it_asks_is_not(guarded):
    assert (await guarded.get("/")).status == 200
    assert (await guarded.get("/main.js")).status == 200
    assert (await guarded.get("/api/model")).status == 401


async def test_only_who_may_call_learns_what_is_not_served(guarded):
    async with grpc.aio.insecure_channel(guarded.target) as channel:
        for path in ("/steering.v1.GenerationService/Guess", "/nothing.at.All/Here", "/grpc.health.v1.Health/Guess"):
            for token, wanted in (
                (None, grpc.StatusCode.UNAUTHENTICATED),
                (token_of("wrong"), grpc.StatusCode.UNAUTHENTICATED),
                (token_of("old-read"), grpc.StatusCode.UNAUTHENTICATED),
                (token_of("read"), grpc.StatusCode.UNIMPLEMENTED),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(path)(NO_MESSAGE, metadata=tuple(bearer(token).items()), timeout=20)
                assert caught.value.code() is wanted, (path, token)
    for verb, path, status in (("GET", "/api/nothing", 404), ("GET", "/api/Generate", 405)):
        for token, wanted in ((None, 401), (token_of("wrong"), 401), (token_of("read"), status)):
            answer = await guarded.ask(verb, path, None, **bearer(token))
            assert answer.status == wanted, (path, token)
            assert answer.headers.get("www-authenticate") == ("Bearer" if wanted == 401 else None)


async def test_a_refused_body_is_not_waited_for(guarded):
    reader, writer = await guarded.open()
    head = f"POST /api/Generate HTTP/1.1\r\nhost: 127.0.0.1:{guarded.port}\r\ncontent-length: 1000\r\n\r\n"
    writer.write(head.encode())
    assert (await asyncio.wait_for(reader.readline(), 5)).split()[1] == b"401"
    writer.close()


async def test_the_old_token_is_refused_within_a_second_of_the_change(guarded):
    path, new = "/steering.v1.GenerationService/GetModelInfo", token_of("new")
    async with grpc.aio.insecure_channel(guarded.target) as channel:
        assert (await call(channel, path, b"", token_of("read")))[0] is grpc.StatusCode.OK
        began = asyncio.get_running_loop().time()
        guarded.tokens.write_text(entry("new", ["read"]))
        while (await call(channel, path, b"", token_of("read")))[0] is grpc.StatusCode.OK:
            await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - began < 1.0
        assert (await call(channel, path, b"", new))[0] is grpc.StatusCode.OK
    assert (await guarded.get("/api/model", **bearer(token_of("read")))).status == 401
    assert (await guarded.get("/api/model", **bearer(new))).status == 200


async def test_a_rate_is_refused_with_a_hint(start, tmp_path):
    path = tmp_path / "tokens.toml"
    path.write_text(entry("slow", ["read", "generate"], "requests_per_minute = 3\ntokens_per_minute = 10"))
    server = await start(tokens=path)
    given = bearer(token_of("slow"))
    prompt = {"prompt": {"text": "x"}}
    most = await server.post("/api/Generate", {**prompt, "sampling": {"max_tokens": 11}}, **given)
    assert (most.status, most.error["param"]) == (400, "sampling.max_tokens")
    # Four are asked for and three are there: seven are left, and six of these are given back.
    for size in (4, 7):
        answer = await server.post("/api/Generate", {**prompt, "sampling": {"max_tokens": size}}, **given)
        assert (answer.status, len(answer.json()["token_ids"])) == (200, 3)
    refused = await server.get("/api/model", **given)
    assert (refused.status, refused.error["code"]) == (429, "RATE_LIMITED")
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert "RetryInfo" in json.dumps(refused.error["details"])
    async with grpc.aio.insecure_channel(server.target) as channel:
        code, words = await call(channel, "/steering.v1.GenerationService/GetModelInfo", b"", token_of("slow"))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "token 'slow' may call 3 times a minute; try again in" in words


async def test_log_and_metrics_know_the_token_by_its_name(guarded, logged):
    answer = await guarded.post("/api/Generate", {"prompt": {"text": "x"}}, **bearer(token_of("generate")))
    assert answer.status == 200
    assert (await guarded.get("/api/model")).status == 401
    [line] = [line for line in logged if line["event"] == "/api/Generate"]
    assert line["token"] == "generate"
    [refusal] = [line for line in logged if line["event"] == "audit"]
    assert refusal["cause"] == "no token"
    # A refusal has that line, and no other.
    assert len(logged) == 2
    registry = guarded.server._metrics.registry
    assert registry.get_sample_value("steer_token_calls_total", {"token": "generate"}) == 1
    assert registry.get_sample_value("steer_access_refusals_total", {"cause": "no token"}) == 1
    assert registry.get_sample_value("steer_access_file_problem", {"file": "tokens"}) == 0


async def test_with_a_listener_for_admin_calls_they_are_served_there_and_nowhere_else(start, tmp_path):
    path = tmp_path / "tokens.toml"
    path.write_text(entry("all", SCOPES))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        admin = f"127.0.0.1:{probe.getsockname()[1]}"
    server = await start(tokens=path, admin_listen=admin, operator_admin=True)
    token = token_of("all")
    async with grpc.aio.insecure_channel(server.target) as main, grpc.aio.insecure_channel(admin) as other:
        for method, scope in RPC_SCOPES.items():
            for channel, is_served in ((main, scope != "admin"), (other, scope == "admin")):
                code, words = await call(channel, method, NO_MESSAGE, token)
                refused = not is_served and method.startswith("/steering.")
                assert (code is grpc.StatusCode.PERMISSION_DENIED) == refused, (method, words)
                assert admin not in words
                # Both ask for a token, and neither says before what it serves.
                if scope != "open":
                    code, _ = await call(channel, method, NO_MESSAGE, None)
                    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert (await server.post("/api/ReloadOperators", **bearer(token))).status == 403
    assert (await server.get("/api/model", **bearer(token))).status == 200


async def test_headers_that_are_meant_to_do_harm_are_refused_and_harm_nobody(guarded):
    path, right = "/steering.v1.GenerationService/GetModelInfo", token_of("read")
    async with grpc.aio.insecure_channel(guarded.target) as channel:
        ask = channel.unary_unary(path)
        for values in (
            [f"Bearer {right}"] * 2,
            [f"Bearer {right}", "Bearer x"],
            [f"bearer {right} "],
            ["Bearer " + "x" * 4000],
            ["Bearer " + "x" * 200_000],
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(b"", metadata=[("authorization", value) for value in values], timeout=20)
            # Of too many bytes gRPC refuses the call before anybody reads it.
            wanted = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert caught.value.code() in (wanted if len(values[0]) > 5000 else {grpc.StatusCode.UNAUTHENTICATED})
        assert (await call(channel, path, b"", right))[0] is grpc.StatusCode.OK
        assert (await ask(b"", metadata=[("authorization", f"bEARER {right}")])) is not None
    head = f"GET /api/model HTTP/1.1\r\nhost: 127.0.0.1:{guarded.port}\r\n".encode()
    for lines in (
        [b"authorization: Bearer " + right.encode()] * 2,
        [b"Authorization: Bearer " + right.encode(), b"AUTHORIZATION: Bearer x"],
        ["authorization: Bearer ünicode".encode()],
        [b"authorization: Bearer \xff\xfe"],
        [b"authorization: Bearer\t" + right.encode()],
        [b"authorization: Bearer " + b"x" * 15_000],
        [b"authorization: Basic " + right.encode()],
    ):
        answer = await guarded.send(head + b"\r\n".join(lines) + b"\r\n\r\n")
        assert answer.status == 401, lines
        assert right not in answer.body.decode()
    too_large = await guarded.send(head + b"authorization: Bearer " + b"x" * 40_000 + b"\r\n\r\n")
    assert too_large.status in (400, 401)
    assert (await guarded.get("/api/model", authorization=f"bEARER {right}")).status == 200


async def test_a_caller_is_whom_the_socket_names_whatever_a_header_says(guarded, logged):
    assert (await guarded.get("/api/model", x_forwarded_for="10.9.9.9", forwarded="for=10.9.9.9")).status == 401
    [refusal] = [line for line in logged if line["event"] == "audit"]
    assert refusal["peer"].startswith("ipv4:127.0.0.1:")
