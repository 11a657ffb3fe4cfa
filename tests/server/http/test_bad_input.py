"""What nobody should send: refused by name, in bounded time and memory; the door goes on."""

import asyncio
import json
import time

import pytest

from steer_server.errors import InvalidRequestError
from steer_server.http.bodies import BodyLimits, read_object
from steer_server.http.door import HttpDoor
from steer_server.rpc.connections import count_connections
from tests.server.http.conftest import read_answer

PROMPT = {"prompt": {"text": "x"}}
PATH = "/api/Generate"


@pytest.fixture
async def door(start):
    """One that serves as ever after the test."""
    made = await start()
    yield made
    made.engine.may_go_on.set()
    assert (await made.post(PATH, PROMPT)).status == 200


async def _until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not UTF-8"),
        (b'\xef\xbb\xbf{"prompt": {}}', "is not JSON"),
        (b'"x"', "no object"),
        (b"[" * 1000 + b"]" * 1000, "nested more than"),
        (b"[" * 400_000, "values or more"),
        (b'{"prompt":' * 200 + b"1" + b"}" * 200, "nested more than"),
        (b'{"prompt": NaN}', "has NaN"),
        (b'{"prompt": -Infinity}', "has -Infinity"),
        (b'{"sampling": {"temperature": 1e999}}', "1e999"),
        (b'{"sampling": {"temperature": ' + b"9" * 5000 + b"}}", "too many digits"),
        (b'{"sampling": {"temperature": ' + b"9" * 309 + b"}}", "too many digits"),
        (b'{"prompt": {"text": "a", "text": "b"}}', "'text' twice"),
        (b'{"prompt": {"text": "\\ud800"}}', "surrogate"),
        (b'{"prompt": {"text": "a\nb"}}', "is not JSON"),
        (b'{"prompt": {"token_ids": {"ids": [' + b"1," * 400_000 + b"1]}}}", "values or more"),
        (b'{"a":[' + b"{}," * 9000 + b"1]}", "9001 objects or more"),
        (b'{"a":' + b"]" * 400_000, "400000 ends of values or more"),
        (b"[" + b'"",' * 10**6 + b"1]", "texts or more"),
        (b'{"a":{' + b",".join(b'"%d":1' % n for n in range(400_000)) + b"}}", "values or more"),
    ],
)
async def test_what_is_no_object_of_json_is_refused_by_what_is_wrong(door, body, said):
    answer = await door.post(PATH, body)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "INVALID_REQUEST", "request")
    assert said in answer.error["message"]


async def test_many_prompts_may_be_token_ids(door):
    text = json.dumps({"prompt": [[7] * 200] * 256}).encode()
    assert len(read_object(text, door.server.doors[0]._rules.bodies.limits)["prompt"]) == 256


def test_a_text_without_an_end_takes_no_longer_than_it_is_long():
    # Each quote of it tried as a beginning would take minutes.
    began = time.monotonic()
    with pytest.raises(InvalidRequestError, match="Unterminated"):
        read_object(b'{"a": "' + b'\\"' * 200_000, BodyLimits(10**6, 4, 1))
    assert time.monotonic() - began < 5


def test_numbers_may_have_as_many_digits_as_a_double():
    text = b'{"a": 0.' + b"1" * 400 + b', "b": ' + b"9" * 308 + b', "c": "' + b"9" * 400 + b'"}'
    assert read_object(text, BodyLimits(10_000, 4, 1)) == {
        "a": float("0." + "1" * 400),
        "b": 10**308 - 1,
        "c": "9" * 400,
    }


def test_brackets_and_commas_in_a_text_are_text():
    limits = BodyLimits(10_000, 4, 1)
    assert read_object(b'{"a": "[[[[[{,,,,,\\"{[,\\\\", "b": "]"}', limits) == {"a": '[[[[[{,,,,,"{[,\\', "b": "]"}


async def test_a_body_that_is_too_large_is_never_held(door):
    most = BodyLimits.of(door.server.doors[0].parts.admission.limits, door.engine.model.context_length).max_bytes
    text = b'{"prompt": {"text": "' + b"x" * most + b'"}}'
    answer = await door.post(PATH, text)
    assert (answer.status, answer.error["code"]) == (413, "REQUEST_TOO_LARGE")
    # Without its length, too.
    head = door.request("POST", PATH, b"", content_length=None, transfer_encoding="chunked")
    chunks = (b"%x\r\n" % len(text) + text + b"\r\n") * 2 + b"0\r\n\r\n"
    assert (await door.send(head + chunks)).status == 413
    # One that is announced is not waited for.
    waits = door.request("POST", PATH, b"", content_length=str(len(text)), expect="100-continue")
    assert (await door.send(waits)).status == 413


async def test_a_body_that_does_not_come_is_given_up(start, logged):
    door = await start(client_patience=0.3, max_calls=1)
    for sent in (b"", b'{"prompt"'):
        head = door.request("POST", PATH, b"", content_length="100")
        answer = await door.send(head + sent)
        assert (answer.status, answer.error["code"]) == (408, "REQUEST_INCOMPLETE")
    assert (await door.post(PATH, PROMPT)).status == 200
    assert not any(door.server._metrics.in_flight.values())


async def test_bodies_that_come_at_once_share_one_room(start):
    door = await start()
    room = door.server.doors[0]._rules.bodies.room
    room.left = whole = 3000
    slow = [await door.open() for _ in range(2)]
    for _, writer in slow:
        writer.write(door.request("POST", PATH, b"", content_length="5000") + b'{"prompt":' + b" " * 1000)
    await _until(lambda: room.left < 1000)
    refused = await door.post(PATH, {"prompt": {"text": "x" * 1000}})
    assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (429, "QUEUE_FULL", "1")
    assert (await door.post(PATH, PROMPT)).status == 200
    for _, writer in slow:
        writer.close()
    await _until(lambda: room.left == whole)
    assert (await door.post(PATH, {"prompt": {"text": "x" * 1000}})).error["code"] == "PROMPT_TOO_LONG"


async def test_a_head_that_does_not_come_ends_the_connection(start):
    door = await start(client_patience=0.3)
    for first in (b"", b"POST /api/Gen", door.request("GET", "/api/model", connection="keep-alive") + b"GET /api"):
        reader, writer = await door.open()
        writer.write(first)
        if first.startswith(b"GET"):
            assert (await read_answer(reader)).status == 200
        began = time.monotonic()
        assert await asyncio.wait_for(reader.read(), 5) == b""
        assert time.monotonic() - began < 2
        writer.close()


async def test_an_idle_connection_is_closed_and_one_in_use_is_not(start):
    door = await start(connection_idle=0.5)
    reader, writer = await door.open()
    for _ in range(3):
        writer.write(door.request("GET", "/api/model", connection="keep-alive"))
        assert (await read_answer(reader)).status == 200
        await asyncio.sleep(0.3)
    [ended] = await asyncio.wait_for(asyncio.gather(reader.read(), return_exceptions=True), 5)
    assert ended == b"" or isinstance(ended, ConnectionError)
    writer.close()


async def test_a_reader_that_stops_is_given_up_and_its_work_stops(start, logged):
    door = await start(client_patience=0.5)
    door.engine.repeat = 10**5
    door.engine.texts = ("x" * 4000,)
    reader, writer = await door.open()
    writer.write(door.request("POST", "/api/GenerateStream", {**PROMPT, "sampling": {"max_tokens": 10**5}}))
    await reader.readuntil(b"\r\n\r\n")
    await _until(lambda: door.engine.cancelled, 20)
    await _until(lambda: any(line.get("reason") == "SLOW_READER" for line in logged))
    await _until(lambda: count_connections(door.port) == 0)
    writer.close()


async def test_an_answer_that_nobody_reads_does_not_keep_its_connection(start):
    door = await start(client_patience=0.5)
    door.engine.texts = ("x" * 20_000_000,)
    reader, writer = await door.open()
    writer.transport.pause_reading()
    writer.write(door.request("POST", PATH, PROMPT, connection="keep-alive"))
    await _until(lambda: door.engine.jobs)
    await _until(lambda: count_connections(door.port) == 0, 10)
    writer.close()
    assert reader


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404),
        ("GET", "/api", 404),
        ("GET", "/api/", 404),
        ("GET", "/api/model/", 404),
        ("GET", "/api/../../etc/passwd", 404),
        ("GET", "/api/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/api/model%00", 404),
        ("GET", "//api/model", 404),
        ("GET", PATH, 405),
        ("POST", "/api/model", 405),
        ("OPTIONS", PATH, 405),
        ("DELETE", "/api/model", 405),
        ("TRACE", "/api/model", 405),
    ],
)
async def test_what_is_not_served_is_said(door, method, path, status):
    answer = await door.ask(method, path, {} if method == "POST" else None)
    assert answer.status == status
    assert answer.error["code"] == {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}[status]
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert ("allow" in answer.headers) is (status == 405)


async def test_a_head_is_answered_without_a_body(door):
    answer = await door.ask("HEAD", "/api/model")
    assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx"],
)
async def test_a_body_is_json_by_its_head(door, kind):
    answer = await door.post(PATH, PROMPT, content_type=kind)
    assert (answer.status, answer.error["code"]) == (415, "CONTENT_TYPE")
    assert (await door.post(PATH, PROMPT, content_type="Application/JSON; charset=utf-8")).status == 200


@pytest.mark.parametrize("coding", ["gzip", "deflate, gzip", "BR"])
async def test_a_compressed_body_is_refused_for_being_one(door, coding):
    answer = await door.post(PATH, PROMPT, content_encoding=coding)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (415, "CONTENT_ENCODING", "Content-Encoding")
    assert answer.headers["accept-encoding"] == "identity"
    assert (await door.post(PATH, PROMPT, content_encoding="Identity")).status == 200


@pytest.mark.parametrize("origin", ["http://example.com", "null", "https://127.0.0.1", "http://127.0.0.1:1", "file://"])
async def test_a_page_of_another_origin_is_refused(door, origin):
    for answer in (await door.post(PATH, PROMPT, origin=origin), await door.get("/api/model", origin=origin)):
        assert (answer.status, answer.error["code"]) == (403, "ORIGIN_REFUSED")
    assert (await door.get("/api", origin=origin)).status == 403
    assert not door.engine.jobs


async def test_a_page_of_this_door_is_served(door):
    for host in (f"127.0.0.1:{door.port}", f"localhost:{door.port}", "[::1]:80", "LOCALHOST"):
        for scheme in ("http", "https"):
            assert (await door.post(PATH, PROMPT, host=host, origin=f"{scheme}://{host}")).status == 200


@pytest.mark.parametrize(
    "host", ["example.com", "localhost.example.com", "", "127.0.0.1.example.com:80", "[::1", "a@b"]
)
async def test_a_name_that_is_not_ours_is_refused(door, host):
    answer = await door.post(PATH, PROMPT, host=host)
    assert answer.status == 403
    assert answer.error["code"] == "HOST_REFUSED"


async def test_a_name_that_was_given_is_ours(start):
    door = await start(names=("gpu-box.example",))
    assert (await door.post(PATH, PROMPT, host="GPU-box.example:8000")).status == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /nothing HTTP/1.1\r\n\r\n",
        b"GET /nothing HTTP/9.9\r\nhost: x\r\nconnection: close\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /nothing HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
        b"POST /nothing HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-length: -1\r\n\r\n",
        b"POST /nothing HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
        b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"GET /nothing HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\nhost: example.com\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_refused(door, head):
    reader, writer = await door.open()
    writer.write(head)
    [said] = await asyncio.wait_for(asyncio.gather(reader.read(), return_exceptions=True), 10)
    assert (
        isinstance(said, ConnectionError)
        or said == b""
        or said.startswith(tuple(b"HTTP/1.1 %d" % status for status in (400, 403, 404)))
    )
    writer.close()


async def test_connections_are_limited(start):
    door = await start(max_connections=10)
    opened = [await door.open() for _ in range(30)]
    await _until(lambda: count_connections(door.port) <= 10)
    for _, writer in opened:
        writer.close()
    await _until(lambda: count_connections(door.port) == 0)
    assert (await door.post(PATH, PROMPT)).status == 200


async def test_calls_are_limited_together_with_those_over_grpc(start, logged):
    door = await start(max_calls=5)
    door.engine.may_go_on.clear()
    calls = [asyncio.ensure_future(door.post(PATH, PROMPT)) for _ in range(40)]
    # One host gets four of five.
    await _until(lambda: sum(call.done() for call in calls) == 36)
    door.engine.may_go_on.set()
    answers = await asyncio.gather(*calls)
    busy = [answer for answer in answers if answer.status == 429]
    assert (len(busy), {answer.error["code"] for answer in busy}) == (36, {"QUEUE_FULL"})
    assert all(1 <= int(answer.headers["retry-after"]) <= 5 for answer in busy)
    await _until(lambda: sum(line.get("refused", 0) for line in logged) == 36)


async def test_while_the_server_drains_new_requests_are_told_and_what_runs_ends(start):
    door = await start(grace=5.0)
    door.engine.may_go_on.clear()
    running = asyncio.ensure_future(door.post("/api/GenerateStream", PROMPT))
    await _until(lambda: door.engine.jobs)
    stopping = asyncio.ensure_future(door.server.stop())
    await asyncio.sleep(0.1)
    refused = await door.post(PATH, PROMPT)
    assert (refused.status, refused.error["code"]) == (503, "SHUTTING_DOWN")
    door.engine.may_go_on.set()
    assert [name for name, _ in (await running).events()] == [""] * 5
    await asyncio.wait_for(stopping, 5)
    with pytest.raises(ConnectionRefusedError):
        await door.open()


async def test_what_outlasts_the_grace_is_cut_off(start, logged):
    door = await start()
    door.engine.may_go_on.clear()
    reader, writer = await door.open()
    writer.write(door.request("POST", "/api/GenerateStream", PROMPT))
    await reader.readuntil(b"started")
    await asyncio.wait_for(door.server.stop(), 5)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await asyncio.wait_for(reader.readuntil(b"finished"), 5)
    assert door.engine.cancelled == 1
    writer.close()


async def test_a_port_that_is_taken_is_said(start):
    from steer_server.errors import StartupError

    door = await start()
    with pytest.raises(StartupError, match=f"cannot serve HTTP on 127.0.0.1:{door.port}"):
        await HttpDoor("127.0.0.1", door.port).start(door.server.doors[0].parts)
