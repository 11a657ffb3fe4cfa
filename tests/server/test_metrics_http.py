"""What is answered over HTTP, and to how many at once."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from steer_server import small_http
from steer_server.access.certificates import read_certificates
from steer_server.lifecycle import PATHS, Lifecycle, State
from steer_server.metrics_http import metrics_server
from tests.authority import Authority


@pytest.fixture
async def ask():
    """``await ask(bytes)``: the answer; ``ask.open()``: a connection; ``ask.lifecycle``: of the server."""
    registry = CollectorRegistry()
    Gauge("depth", "Of a thing", registry=registry).set(7)

    class Asking:
        lifecycle = Lifecycle(State.SERVING)

        async def open(self):
            return await asyncio.open_connection("127.0.0.1", self.port)

        async def __call__(self, request):
            reader, writer = await self.open()
            writer.write(request)
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            return answer

    asking = Asking()
    server = metrics_server(registry, asking.lifecycle)
    asking.port = await server.start("127.0.0.1", 0)
    yield asking
    server.close()


async def test_metrics_are_at_their_path(ask):
    head, _, body = (await ask(b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    [family] = text_string_to_metric_families(body.decode())
    assert (family.name, family.samples[0].value) == ("depth", 7)
    assert f"Content-Length: {len(body)}".encode() in head


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET / HTTP/1.1", 404),
        ("GET /metricsx HTTP/1.1", 404),
        ("GET /metrics/ HTTP/1.1", 404),
        ("", 404),
        ("POST /metrics HTTP/1.1", 405),
        ("HEAD /metrics HTTP/1.1", 200),
    ],
)
async def test_anything_else_is_refused(ask, request_line, status):
    answer = await ask(f"{request_line}\r\n\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"depth" not in answer


@pytest.mark.parametrize(
    ("state", "passed"),
    [
        (State.LOADING, {"/livez"}),
        (State.SERVING, {"/livez", "/readyz", "/startedz", "/healthz"}),
        (State.STOPPING, {"/livez", "/startedz"}),
        (State.DEAD, set()),
    ],
)
async def test_each_probe_says_what_the_state_of_the_server_is(ask, state, passed):
    ask.lifecycle.state = state
    for path in PATHS:
        answer = await ask(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 200 " if path in passed else b"HTTP/1.1 503 "), path
        assert answer.endswith(b"\r\n\r\nok\n" if path in passed else f"\r\n\r\n{state.value}\n".encode())


async def test_requests_that_are_never_finished_neither_pile_up_nor_last(ask, monkeypatch):
    monkeypatch.setattr(small_http, "_SECONDS", 0.5)
    threads = threading.active_count()
    opened = [await ask.open() for _ in range(300)]
    for _, writer in opened:
        writer.write(b"GET /metrics HTTP/1.1\r\n")
    ended = await asyncio.wait_for(asyncio.gather(*(reader.read() for reader, _ in opened), return_exceptions=True), 10)
    assert all(answer == b"" or isinstance(answer, ConnectionError) for answer in ended)
    assert threading.active_count() <= threads
    assert b"depth 7" in await ask(b"GET /metrics HTTP/1.1\r\n\r\n")


async def test_a_head_without_an_end_is_cut_off(ask):
    reader, writer = await ask.open()
    writer.write(b"x" * 100_000)
    [ended] = await asyncio.wait_for(asyncio.gather(reader.read(), return_exceptions=True), 5)
    assert ended == b"" or isinstance(ended, ConnectionError)
    assert b"depth 7" in await ask(b"GET /metrics HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=abc", "text/plain;version=\xff", ";,=", ""])
async def test_an_accept_header_that_makes_no_sense_gets_the_usual_format(ask, accept):
    answer = await ask(f"GET /metrics HTTP/1.1\r\nAccept: {accept}\r\n\r\n".encode("latin-1"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4")


async def test_metrics_are_there_while_all_other_threads_are_taken(ask):
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    hangs = threading.Event()
    taken = asyncio.ensure_future(asyncio.to_thread(hangs.wait))
    try:
        assert b"depth" in await ask(b"GET /metrics HTTP/1.1\r\n\r\n")
    finally:
        hangs.set()
        await taken


async def test_connections_that_never_shake_hands_are_bounded_and_end(monkeypatch, tmp_path):
    monkeypatch.setattr(small_http, "_MAX_CONNECTIONS", 4)
    monkeypatch.setattr(small_http, "_SECONDS", 0.5)
    authority = Authority()
    server = small_http.SmallHttp(Lifecycle(State.SERVING), {})
    files = read_certificates(*authority.issue())
    port = await server.start("127.0.0.1", 0, files.context)
    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(6)]
    assert [await asyncio.wait_for(reader.read(), 0.4) for reader, _ in silent[4:]] == [b"", b""]
    # The others are given up after the time that an exchange may take.
    await asyncio.wait_for(asyncio.gather(*(reader.read() for reader, _ in silent), return_exceptions=True), 5)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=authority.context(None, tmp_path))
    writer.write(b"GET /livez HTTP/1.1\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    for _, each in (*silent, (reader, writer)):
        each.close()
    server.close()
