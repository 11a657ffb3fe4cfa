"""What a server that stops says, when it says it, and until when it takes calls."""

import asyncio
import signal
import time
from dataclasses import dataclass, field

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from steer_client import AsyncSteerClient, ServerUnavailableError
from transformers import PreTrainedTokenizerFast

from steer_server.config import ServerConfig
from steer_server.engine.work import WorkDone
from steer_server.errors import EngineDiedError
from steer_server.lifecycle import State
from steer_server.rpc.server import SERVICES, SteerServer
from steer_server.types import ModelInfo

DELAY = 0.8
STATUS = health_pb2.HealthCheckResponse


@dataclass(eq=False)
class _Engine:
    model: ModelInfo
    tokenizer: PreTrainedTokenizerFast
    running: int = 0
    waiting: int = 0
    undelivered: int = 0
    collectors: tuple = ()
    work: WorkDone = field(default_factory=WorkDone)
    dead: asyncio.Event = field(default_factory=asyncio.Event)

    async def encode(self, prompt):
        return (1, 2, 3)

    async def failed(self):
        await self.dead.wait()
        return "all of it broke"

    async def close(self): ...


class _Registry:
    def entries(self):
        return ()

    def reload(self): ...


@pytest.fixture
async def served(model_info, tiny_tokenizer):
    """A server that has been told to serve: engine, server, target, and the task that ends with it."""
    engine = _Engine(model_info, tiny_tokenizer)
    server = SteerServer(engine, _Registry(), ServerConfig(listen="127.0.0.1:0", grace=0.0, drain_delay=DELAY))
    target = f"127.0.0.1:{await server.start()}"
    serving = asyncio.ensure_future(server.serve_until_signalled())
    await asyncio.sleep(0)
    yield engine, server, target, serving
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await server.stop()


async def _states(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    names = ("", "ready", *SERVICES, "started", "live")
    answers = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in names]
    return [answer.status == STATUS.SERVING for answer in answers]


async def _is_served(client):
    try:
        await client.operators()
    except ServerUnavailableError:
        return False
    return True


async def test_new_calls_are_served_for_the_delay_and_then_told_that_the_server_stops(served):
    _, _, target, serving = served
    async with grpc.aio.insecure_channel(target) as channel, AsyncSteerClient(target, retry=False) as client:
        assert await _states(channel) == [True] * 6
        began = time.monotonic()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        assert await _states(channel) == [False] * 4 + [True] * 2
        # A connection of its own: the port is open too.
        async with AsyncSteerClient(target, retry=False) as late:
            assert await late.operators() == ()
        while await _is_served(client):
            await asyncio.sleep(0.01)
        assert time.monotonic() - began >= DELAY
        await asyncio.wait_for(serving, 10)


async def test_a_server_whose_engine_dies_waits_for_nobody_and_is_not_live(served):
    engine, server, _, serving = served
    signal.raise_signal(signal.SIGTERM)
    await asyncio.sleep(0.05)
    assert (server.lifecycle.state, server.lifecycle.holds("live")) == (State.STOPPING, True)
    began = time.monotonic()
    engine.dead.set()
    with pytest.raises(EngineDiedError, match="all of it broke"):
        await asyncio.wait_for(serving, 10)
    assert time.monotonic() - began < DELAY
    assert not server.lifecycle.holds("live")
