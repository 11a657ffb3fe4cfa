"""A real server in this process, on the tiny model, whose store clients may change."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from steer_client import AsyncSteerClient, SamplingParams

from operators.core.artifact import OperatorArtifact, to_bytes
from operators.core.store import Store
from steer_server.admin.operator_admin import OperatorAdmin
from steer_server.config import ServerConfig
from steer_server.engine.hf.engine import HFEngine
from steer_server.registry import Registry
from steer_server.rpc.server import SteerServer

SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


@dataclass
class Served:
    """A server, its store, and a client of it."""

    server: SteerServer
    store: Store
    client: AsyncSteerClient
    target: str

    async def plain(self) -> tuple[int, ...]:
        """What a plain request is answered, whatever was done to the store."""
        return (await self.client.generate("the bay", sampling=SHORT)).token_ids

    def files(self) -> dict[str, bytes]:
        """All that is in the store."""
        return {path.name: b"" if path.is_dir() else path.read_bytes() for path in self.store.path.iterdir()}

    async def names(self) -> dict[str, bool]:
        """The operators that the server knows, and whether they can be used."""
        return {each.name: each.usable for each in await self.client.operators()}


@pytest.fixture
async def serve(llama, artifact, tmp_path):
    """``await serve(**settings)``: such a server, with the operator "golden"."""
    started = []

    async def start(**settings) -> Served:
        store = Store(tmp_path / "store")
        if not store.path.exists():
            store.save("golden", artifact)
        engine = HFEngine(llama, max_queue=8)
        settings = {"listen": "127.0.0.1:0", "grace": 0.0, "operator_admin": True, **settings}
        config = ServerConfig(**settings)
        registry = Registry(store, engine.model, max_bytes=config.max_artifact_bytes, max_dose=config.max_dose)
        admin = OperatorAdmin(config, store, registry, engine.model) if config.operator_admin else None
        server = SteerServer(engine, registry, config, admin=admin)
        target = f"127.0.0.1:{await server.start()}"
        served = Served(server, store, AsyncSteerClient(target, timeout=30, retry=False), target)
        started.append(served)
        return served

    yield start
    for each in started:
        await each.client.close()
        await each.server.stop()


@pytest.fixture
async def served(serve) -> Served:
    """One with usual settings."""
    return await serve()


@pytest.fixture
def file_of(tmp_path) -> Callable[[OperatorArtifact, str], Path]:
    """``file_of(artifact, name)``: its file, as users have it."""

    def write(artifact: OperatorArtifact, name: str = "dress") -> Path:
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(to_bytes(artifact))
        return path

    return write
