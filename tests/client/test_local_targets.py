"""A proxy is for other machines, and a client for one event loop at a time."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from steer_client import AsyncSteerClient, SteerClient, SteerError
from steer_client._channel import channel_options

NO_PROXY = ("grpc.enable_http_proxy", 0)


class _Serving(health_pb2_grpc.HealthServicer):
    def Check(self, request, context):  # noqa: N802
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@pytest.fixture
def target():
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(_Serving(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.mark.parametrize(
    "target",
    [
        *("127.0.0.1:1", "127.9.9.9:1", "localhost:1", "LOCALHOST:1", "[::1]:1", "unix:/tmp/x", "unix-abstract:x"),
        *("dns:///localhost:1", "ipv4:127.0.0.1:1,127.0.0.1:2", "ipv6:[::1]:1,[::1]:2"),
    ],
)
def test_this_machine_is_asked_without_a_proxy(target):
    assert NO_PROXY in channel_options(target)


@pytest.mark.parametrize(
    "target", ["10.0.0.1:1", "steer:1", "dns:///steer:1", "ipv4:127.0.0.1:1,10.0.0.1:1", "localhost.example.org:1"]
)
def test_another_machine_may_be_behind_one(target):
    assert NO_PROXY not in channel_options(target)


def test_a_proxy_that_is_not_there_is_not_asked_for_this_machine(target, monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with SteerClient(target, timeout=10) as client:
        assert client.health()


def test_an_async_client_serves_one_loop_after_the_other(target):
    client = AsyncSteerClient(target, timeout=10)
    for _ in range(3):
        assert asyncio.run(client.health())
    asyncio.run(client.close())


async def test_an_async_client_that_is_in_use_on_another_loop_says_so(target):
    async with AsyncSteerClient(target, timeout=10) as client:
        assert await client.health()

        def elsewhere():
            with pytest.raises(SteerError, match="in use on another event loop"):
                asyncio.run(client.health())

        await asyncio.to_thread(elsewhere)
        assert await client.health()
