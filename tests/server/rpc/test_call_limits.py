"""Calls, connections and clients that take more than their share: refused or ended by name, and seen in the log."""

import asyncio
import resource
import socket
import time
from dataclasses import dataclass

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from steering.v1 import generation_pb2 as pb
from steering.v1 import generation_pb2_grpc, text_pb2

from steer_server.config import ServerConfig
from steer_server.engine.work import WorkDone
from steer_server.rpc import call_limit
from steer_server.rpc.connections import count_connections, room_for_connections, watch_connections
from steer_server.rpc.server import SteerServer
from steer_server.rpc.transport import channel_options
from steer_server.types import FinishReason, ModelInfo, RowFinished, TokenEvent, TokenLogprob, TopLogprob

OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
REQUEST = pb.GenerateRequest(prompt=text_pb2.Prompt(text="x"), request_id="mine")
WORDY = TokenLogprob(1, "x", -1.0, tuple(TopLogprob(n, "y" * 50, -2.0) for n in range(20)))


@dataclass
class _Stream:
    """Endless, or of so many tokens."""

    engine: "_Engine"

    async def __aiter__(self):
        for _ in range(self.engine.tokens):
            await self.engine.may_go_on.wait()
            yield TokenEvent(0, 1, "a secret", WORDY)
        yield RowFinished(0, FinishReason.MAX_TOKENS, "", "", ())

    def cancel(self):
        self.engine.cancelled += 1


class _Engine:
    """Answers at once, unless a test holds it up."""

    def __init__(self, model: ModelInfo, tokenizer) -> None:
        self.model, self.running, self.waiting, self.undelivered, self.collectors = model, 0, 0, 0, ()
        self.tokenizer, self.work = tokenizer, WorkDone()
        self.tokens, self.cancelled = 2, 0
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def encode(self, prompt):
        return (1, 2, 3)

    def fit(self, job):
        return job

    def submit(self, job):
        return _Stream(self)

    async def failed(self):
        await asyncio.Event().wait()

    async def close(self): ...


class _Registry:
    def entries(self):
        return ()

    def reload(self): ...

    async def plan_beside(self, groups):
        return (None,)


@pytest.fixture
async def start(model_info, tiny_tokenizer):
    """``await start(**settings)``: the engine, the server and its target."""
    servers = []

    async def make(**settings):
        engine = _Engine(model_info, tiny_tokenizer)
        server = SteerServer(engine, _Registry(), ServerConfig(listen="127.0.0.1:0", grace=0.0, **settings))
        servers.append(server)
        return engine, server, f"127.0.0.1:{await server.start()}"

    yield make
    for server in servers:
        await server.stop()


@pytest.fixture
def logged():
    with structlog.testing.capture_logs() as lines:
        yield lines


async def _outcome(call):
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error
    return None


def _hint(error):
    """Seconds after which the client may try again."""
    retry = error_details_pb2.RetryInfo()
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert any(detail.Unpack(retry) for detail in status.details)
    return retry.retry_delay.ToTimedelta().total_seconds()


async def _read_to_end(call):
    while await call.read() is not grpc.aio.EOF:
        pass


async def _until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("channels", [1, 5])
async def test_of_very_many_calls_at_once_each_is_served_or_told_when_to_come_again(start, logged, channels):
    engine, server, target = await start(max_calls=20)
    engine.may_go_on.clear()
    opened = [grpc.aio.insecure_channel(target, OWN_CONNECTION) for _ in range(channels)]
    stubs = [generation_pb2_grpc.GenerationServiceStub(channel) for channel in opened]
    calls = [asyncio.ensure_future(_outcome(stubs[n % channels].Generate(REQUEST, timeout=60))) for n in range(2500)]
    await _until(lambda: sum(call.done() for call in calls) == 2485, 60)
    engine.may_go_on.set()
    errors = [error for error in await asyncio.gather(*calls) if error is not None]
    assert len(errors) == 2485
    assert {error.code() for error in errors} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    hints = {_hint(error) for error in errors}
    assert min(hints) >= 1
    assert len(hints) > 2000, "who was refused together comes back together"
    await asyncio.gather(*(channel.close() for channel in opened))
    await _until(lambda: sum(line.get("refused", 0) for line in logged) == 2485)
    read = server._metrics.registry.get_sample_value
    labels = {"grpc_method": "Generate", "reason": "QUEUE_FULL"}
    assert read("steer_errors_total", labels) == 2485
    assert read("steer_limit", {"name": "max_calls"}) == 20


async def test_health_is_told_while_there_is_no_room_for_calls(start):
    engine, _, target = await start(max_calls=1)
    engine.may_go_on.clear()
    async with grpc.aio.insecure_channel(target) as channel:
        running = asyncio.ensure_future(_outcome(generation_pb2_grpc.GenerationServiceStub(channel).Generate(REQUEST)))
        await asyncio.sleep(0.1)
        check = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert check.status == health_pb2.HealthCheckResponse.SERVING
        engine.may_go_on.set()
        assert await running is None


async def test_who_asks_for_the_health_once_is_told_beside_any_number_of_watchers(start):
    _, _, target = await start(max_connections=3)
    async with grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(5)]
        codes = [await _outcome(each.read()) for each in watches]
        assert codes.count(None) == 3, "the others are refused"
        check = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert check.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "Compare", "Tokenize"])
async def test_a_call_whose_request_never_comes_ends_and_frees_its_place(start, method):
    _, server, target = await start(client_patience=0.3, max_calls=1)
    async with grpc.aio.insecure_channel(target) as channel:
        path = f"/steering.v1.GenerationService/{method}"
        call = channel.stream_stream(path)()
        await asyncio.sleep(0.1)
        assert not any(server._metrics.in_flight.values()), "a stopping server waits for those in flight"
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "did not arrive within 0.3 s" in await call.details()
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert len((await stub.Generate(REQUEST, timeout=5)).token_ids) == 2


@pytest.mark.parametrize("connections", [1, 6])
async def test_calls_without_requests_keep_nobody_out(start, monkeypatch, connections):
    _, server, target = await start(max_calls=8)
    # Where each connection has one such call, it has no more of them than a newcomer will: then their age decides.
    monkeypatch.setattr(call_limit, "_SLOW_SECONDS", 60.0 if connections == 1 else 0.0)
    opened = [grpc.aio.insecure_channel(target, OWN_CONNECTION) for _ in range(connections)]
    slow = [opened[n % connections].stream_stream("/steering.v1.GenerationService/Generate")() for n in range(6)]
    # All that one host gets of eight.
    await _until(lambda: server._calls.calls == 6)
    async with grpc.aio.insecure_channel(target, OWN_CONNECTION) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert len((await stub.Generate(REQUEST, timeout=5)).token_ids) == 2
    await _until(lambda: sum(call.done() for call in slow) == 1)
    [ended] = [call for call in slow if call.done()]
    assert await ended.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "needed the place of this one, whose request had not arrived" in await ended.details()
    assert server._calls.calls == 5
    await asyncio.gather(*(each.close() for each in opened))
    await _until(lambda: server._calls.calls == 0)


async def test_a_call_that_ends_without_a_request_is_an_invalid_one(start):
    _, _, target = await start()
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.stream_stream("/steering.v1.GenerationService/Generate")()
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_client_that_does_not_read_is_ended_by_name_and_its_work_stops(start, logged):
    engine, server, target = await start(client_patience=0.5)
    engine.tokens = 10**6
    options = (*OWN_CONNECTION, ("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with grpc.aio.insecure_channel(target, options) as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).GenerateStream(REQUEST)
        await call.read()
        await _until(lambda: engine.cancelled, 10)
        await _until(lambda: any(line.get("reason") == "SLOW_READER" for line in logged), 10)
        [line] = [line for line in logged if line.get("reason") == "SLOW_READER"]
        assert line["code"] == "DEADLINE_EXCEEDED"
        assert not any(server._metrics.in_flight.values())
        # What was sent before is still read, and then the reason.
        error = await _outcome(_read_to_end(call))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the client did not read it" in error.details()


async def test_a_client_that_leaves_during_a_write_is_cancelled_and_no_failure(start, logged):
    engine, _, target = await start(client_patience=20)
    engine.tokens = 10**6
    channel = grpc.aio.insecure_channel(target, OWN_CONNECTION)
    calls = [generation_pb2_grpc.GenerationServiceStub(channel).GenerateStream(REQUEST) for _ in range(8)]
    await asyncio.gather(*(call.read() for call in calls))
    await asyncio.sleep(0.3)
    for call in calls[:4]:
        call.cancel()
    await channel.close()
    await _until(lambda: sum(line["event"] == "GenerateStream" for line in logged) == 8)
    ended = [line for line in logged if line["event"] == "GenerateStream"]
    assert {line["code"] for line in ended} == {"CANCELLED"}
    assert not [line for line in logged if "exc_info" in line]
    assert engine.cancelled == 8


async def test_a_deadline_is_booked_as_one_whoever_notices_first(start, logged):
    engine, _, target = await start()
    engine.may_go_on.clear()
    async with grpc.aio.insecure_channel(target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        calls = [_outcome(stub.Generate(REQUEST, timeout=0.4 + n / 500)) for n in range(80)]
        assert {error.code() for error in await asyncio.gather(*calls)} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        await _until(lambda: sum(line["event"] == "Generate" for line in logged) == 80)
    assert {line["code"] for line in logged if line["event"] == "Generate"} == {"DEADLINE_EXCEEDED"}


async def test_a_line_of_the_log_says_who_asked_for_what_and_never_a_text(start, logged):
    _, _, target = await start()
    async with grpc.aio.insecure_channel(target) as channel:
        await generation_pb2_grpc.GenerationServiceStub(channel).Generate(REQUEST)
        bad = pb.GenerateRequest(
            request_id="b", prompt=REQUEST.prompt, operators=[{"words": [{"text": "secret " * 20}]}]
        )
        await _outcome(generation_pb2_grpc.GenerationServiceStub(channel).Generate(bad))
    good, refused = (line for line in logged if line["event"] == "Generate")
    assert good["peer"].startswith("ipv4:127.0.0.1:")
    assert (good["request_id"], good["prompt_tokens"], good["generated_tokens"], good["texts"]) == ("mine", 3, 2, 1)
    assert 0 <= good["queued"] <= good["first_token"] <= good["total"] <= good["seconds"] + 0.01
    assert (refused["reason"], refused["code"]) == ("INVALID_REQUEST", "INVALID_ARGUMENT")
    assert "words" in refused["field"]
    assert "secret" not in str(logged)


def test_pings_that_clients_of_grpc_may_send_are_admitted():
    # gRPC's clients send one in 10 s at most. Slower to try than to read: two strikes are free.
    options = dict(channel_options(ServerConfig(), max_connections=5, max_message_bytes=1000))
    assert options["grpc.http2.min_ping_interval_without_data_ms"] < 10_000
    assert options["grpc.keepalive_permit_without_calls"] == 1


async def test_an_idle_connection_is_closed_and_opened_again_when_it_is_needed(start):
    _, _, target = await start(connection_idle=0.3)
    port = int(target.rpartition(":")[2])
    async with grpc.aio.insecure_channel(target, OWN_CONNECTION) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        await stub.Generate(REQUEST, timeout=5)
        await _until(lambda: count_connections(port) == 0)
        await stub.Generate(REQUEST, timeout=5)


async def test_connections_are_limited_and_the_log_says_when_they_run_out(start, logged):
    _, _, target = await start(max_connections=10)
    host, _, port = target.rpartition(":")
    sockets = [await asyncio.to_thread(socket.create_connection, (host, int(port))) for _ in range(30)]
    for each in sockets:
        each.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
    await _until(lambda: count_connections(int(port)) <= 10)
    watch = asyncio.ensure_future(watch_connections(lambda: count_connections(int(port)), 10, every=0.05))
    await _until(lambda: any(line["event"] == "nearly all connections are taken" for line in logged))
    for each in sockets:
        each.close()
    watch.cancel()


def test_connections_leave_room_for_other_files(monkeypatch, logged):
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, value: limits.append(value))
    assert room_for_connections(500) == 500
    assert len(limits) == 1
    assert room_for_connections(1024) == 1024
    assert limits[-1] == (1280, 4096)
    assert room_for_connections(10_000) == 4096 - 256
    assert logged[-1]["max_connections"] == 4096 - 256
