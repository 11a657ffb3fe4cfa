"""What the metrics say, by Prometheus' conventions; and that no client can make more of them."""

import asyncio
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress

import grpc
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from steer_client import AsyncSteerClient, OperatorUse, SamplingParams, SteerError
from steering.v1 import generation_pb2 as pb
from steering.v1 import text_pb2

from operators.core.apply import prepared_bytes
from operators.core.positions import Positions
from operators.core.store import Store
from steer_server.config import ServerConfig
from steer_server.engine.hf.engine import HFEngine
from steer_server.http.door import HttpDoor
from steer_server.metrics import Metrics
from steer_server.registry import Registry
from steer_server.rpc.server import SteerServer
from steer_server.types import Completion, FinishReason, Receipt, Started, Timings, Usage

MARK = "hostile"
TEXT = SamplingParams(max_tokens=2, ignore_eos=True)


class Served:
    """A server on the tiny model, with one operator."""

    def __init__(self, server: SteerServer, door: HttpDoor, target: str) -> None:
        self.server, self.door, self.target = server, door, target
        self.client = AsyncSteerClient(target, timeout=60)

    @property
    def registry(self) -> CollectorRegistry:
        return self.server._metrics.registry

    def read(self, metric: str, /, **labels: str) -> float | None:
        return self.registry.get_sample_value(metric, labels)

    async def ask(self, head: str) -> None:
        """Sends the head of a request over HTTP, and reads what comes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.door.port)
        writer.write(f"{head}\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        with suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 20)
        writer.close()


@pytest.fixture
async def served(llama, artifact, tmp_path):
    Store(tmp_path).save("golden", artifact)
    engine, door = HFEngine(llama, max_queue=8, operator_memory=1 << 20), HttpDoor("127.0.0.1", 0)
    registry = Registry(Store(tmp_path), engine.model, max_bytes=1 << 30, max_dose=1.0)
    config = ServerConfig(listen="127.0.0.1:0", grace=0.0, max_tokens=500, max_time=60)
    server = SteerServer(engine, registry, config, (door,))
    made = Served(server, door, f"127.0.0.1:{await server.start()}")
    async with made.client:
        yield made
    await server.stop()


async def _attack(served: Served) -> None:
    """Names of everything that a client can name, each one new."""

    def name() -> str:
        return f"{MARK}-{secrets.token_hex(4)}"

    for _ in range(15):
        for head in (
            f"GET /{name()} HTTP/1.1",
            f"POST /api/{name()} HTTP/1.1",
            f"{name().upper()} /api/model HTTP/1.1",
        ):
            await served.ask(head)
        await served.ask(f"GET /v1/models/{name()}?{name()}={name()} HTTP/1.1\r\n{name()}: x")
    metadata = lambda: ((name(), name()), ("authorization", f"Bearer {name()}"))  # noqa: E731
    async with grpc.aio.insecure_channel(served.target) as channel:
        for _ in range(15):
            for method in (f"/{name()}/{name()}", f"/steering.v1.GenerationService/{name()}"):
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.unary_unary(method)(name().encode(), metadata=metadata())
            request = pb.GenerateRequest(prompt=text_pb2.Prompt(text=name()), request_id=name())
            request.operators.add(name=name())
            for data in (request.SerializeToString(), name().encode()):
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.unary_unary("/steering.v1.GenerationService/Generate")(data, metadata=metadata())
    for _ in range(3):
        with suppress(SteerError):
            await served.client.compare(name(), arms={name(): [OperatorUse("golden", 0.2)]}, sampling=TEXT)


def _series(served: Served) -> set[str]:
    lines = generate_latest(served.registry).decode().splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}


async def test_clients_add_no_series_by_what_they_name(served):
    await _attack(served)
    before = _series(served)
    await _attack(served)
    assert _series(served) == before
    assert [line for line in before if MARK in line.lower()] == []
    assert len(before) < 600
    assert served.read("steer_http_requests_total", path="other", status="404") == 2 * 15 * 2
    unknown = {"grpc_method": "Generate", "reason": "UNKNOWN_OPERATOR"}
    assert served.read("steer_errors_total", **unknown) == 2 * 15


def _count_texts(metrics: Metrics, names: Iterable[str]) -> list[str]:
    """Counts a text steered by each; the labels of operators that there are then."""
    for name in names:
        counted = metrics.follow()
        positions = {"prompt_tokens_steered": 1, "generated_tokens_steered": 1, "prompt_tokens_cached": 0}
        doses = {"mean_dose": 0.2, "max_dose": 0.2, "dose_bound": 0.2}
        setting = ("cumulative", 0.4, 0.0, Positions(), "concept", "operator")
        receipt = Receipt(name, "sha256:0", 1, *setting, **positions, **doses, defaulted=(), calibrated=False)
        usage, timings = Usage(1, 1), Timings(0.0, 0.1, 0.2)
        counted.see(Started("id", (1,)))
        counted.see(Completion("id", "", (1,), FinishReason.EOS, "", usage, timings, (receipt,), (), 0))
    families = {family.name: family for family in metrics.registry.collect()}
    found = [
        {sample.labels["operator"] for sample in families[name].samples}
        for name in ("steer_positions_steered", "steer_dose_ratio")
    ]
    assert found[0] == found[1]
    return sorted(found[0])


async def test_of_many_operators_only_some_have_series_of_their_own(served, monkeypatch):
    names = [f"op{place}" for place in range(300)]
    monkeypatch.setattr(served.server.registry, "names", lambda: set(names))
    metrics = Metrics(served.server.engine, served.server.registry)
    assert len(_count_texts(metrics, names)) == 101
    read = metrics.registry.get_sample_value
    assert read("steer_positions_steered_total", {"operator": "other"}) == 2 * 200


async def test_operators_that_are_gone_leave_their_series_to_those_that_come(served, monkeypatch):
    in_service = {"stays"}
    monkeypatch.setattr(served.server.registry, "names", lambda: in_service)
    metrics = Metrics(served.server.engine, served.server.registry)
    _count_texts(metrics, ["stays"])
    for place in range(250):
        in_service = {"stays", f"op{place}"}
        found = _count_texts(metrics, [f"op{place}"])
        assert {"stays", f"op{place}"} <= set(found)
        assert len(found) <= 100
    assert "other" not in found
    assert metrics.registry.get_sample_value("steer_positions_steered_total", {"operator": "stays"}) == 2


async def test_every_metric_keeps_the_conventions(served):
    await served.client.generate("the bay", operators=[OperatorUse("golden", 0.3)], sampling=TEXT)
    foreign = ("process", "python")
    for family in served.registry.collect():
        if family.name.startswith(foreign):
            continue
        assert family.documentation, family.name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
        assert not re.search(r"_(ms|millis|milliseconds|kb|mb|gb|minutes|total|count|info)$", family.name), family.name
        assert family.name.startswith(("steer_", "grpc_server_"))
        for sample in family.samples:
            assert all(re.fullmatch(r"[a-z][a-z_]*", label) for label in sample.labels), sample
            if family.type == "counter":
                assert sample.name == f"{family.name}_total"


async def test_memory_limits_versions_and_connections_are_shown(served, artifact):
    assert served.read("steer_memory_bytes", purpose="operators") == 0
    await served.client.generate("the bay", operators=[OperatorUse("golden", 0.3)], sampling=TEXT)
    assert served.read("steer_memory_bytes", purpose="operators") == prepared_bytes(artifact)
    assert served.read("steer_memory_bytes", purpose="decode") == 0
    assert served.read("steer_memory_limit_bytes", purpose="operators") == 1 << 20
    assert served.read("steer_limit", name="max_tokens") == 500
    assert served.read("steer_limit", name="max_total_tokens") is None
    [build] = [family for family in served.registry.collect() if family.name == "steer_build"]
    assert build.samples[0].labels.keys() == {"version", "python", "grpcio", "torch", "transformers", "vllm"}
    reader, writer = await asyncio.open_connection("127.0.0.1", served.door.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    await reader.readline()
    assert served.read("steer_connections", door="http") == 1
    writer.close()
    async with asyncio.timeout(10):
        while not served.read("steer_connections", door="grpc"):
            await asyncio.sleep(0.1)
