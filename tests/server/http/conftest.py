"""A door on an engine that answers at once, or when a test lets it."""

import asyncio
import json
import ssl
from dataclasses import dataclass, field

import pytest
import structlog

from operators.core.store import Store
from steer_server.admin.operator_admin import OperatorAdmin
from steer_server.config import ServerConfig
from steer_server.engine.work import WorkDone
from steer_server.errors import UnknownOperatorError
from steer_server.http.door import HttpDoor
from steer_server.rpc.server import SteerServer
from steer_server.types import (
    FinishReason,
    ModelInfo,
    RowFinished,
    TokenEvent,
    TokenLogprob,
    TopLogprob,
)


class Stream:
    """The tokens of the engine, once for each row of a job."""

    def __init__(self, engine: "Engine", job) -> None:
        self.engine, self.job = engine, job

    async def __aiter__(self):
        rows = range(len(self.job.rows))
        sampling = self.job.rows[0].sampling
        texts = self.engine.texts * self.engine.repeat
        for place, text in enumerate(texts[: sampling.max_tokens]):
            await self.engine.may_go_on.wait()
            for row in rows:
                logprob = None
                if sampling.logprobs is not None:
                    top = tuple(TopLogprob(n, f"t{n}", -1.0 - n) for n in range(sampling.logprobs))
                    logprob = TokenLogprob(place, text, -0.5, top)
                yield TokenEvent(row, place, text, logprob)
            if self.engine.error is not None:
                raise self.engine.error
        for row in rows:
            yield RowFinished(row, self.engine.reason, "", "", ())

    def cancel(self):
        self.engine.cancelled += 1


@dataclass(eq=False)
class Engine:
    """As far as the services ask one."""

    model: ModelInfo
    tokenizer: object
    texts: tuple[str, ...] = ("a", " secret", " \u2603")
    repeat: int = 1
    reason: FinishReason = FinishReason.MAX_TOKENS
    error: Exception | None = None
    cancelled: int = 0
    jobs: list = field(default_factory=list)
    running: int = 0
    waiting: int = 0
    undelivered: int = 0
    collectors: tuple = ()
    work: WorkDone = field(default_factory=WorkDone)
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self):
        self.may_go_on.set()

    async def encode(self, prompt):
        self.prompt = prompt
        return (1, 2, 3)

    async def token_texts(self, ids):
        return tuple(f"t{each}" for each in ids)

    def fit(self, job):
        return job

    def check(self, job): ...

    def jobs_at_once(self, job):
        return 2

    def submit(self, job):
        self.jobs.append(job)
        return Stream(self, job)

    async def failed(self):
        await asyncio.Event().wait()

    async def close(self): ...


class Registry:
    """Has no operators."""

    def entries(self):
        return ()

    def entry(self, name):
        raise UnknownOperatorError(name, ())

    def reload(self): ...

    async def plan_beside(self, groups):
        for uses in groups.values():
            for use in uses:
                self.entry(use.name)
        return (None,) * len(groups)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json()["error"]

    def events(self):
        """(name, value) of each event of a stream."""
        found = []
        for block in self.body.decode().split("\n\n")[:-1]:
            lines = dict(line.split(": ", 1) for line in block.split("\n"))
            found.append(
                (lines.get("event", ""), lines["data"] if lines["data"] == "[DONE]" else json.loads(lines["data"]))
            )
        return found


@dataclass
class Doorway:
    """A server with its door, and how to ask it."""

    engine: Engine
    server: SteerServer
    port: int
    target: str = ""
    """Of gRPC."""
    tls: ssl.SSLContext | None = None
    """Of whoever asks over HTTP."""

    async def open(self):
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls)

    async def send(self, data: bytes) -> Answer:
        """The first answer to some bytes."""
        reader, writer = await self.open()
        try:
            writer.write(data)
            return await read_answer(reader)
        finally:
            writer.close()

    async def ask(self, method, path, body=None, **headers) -> Answer:
        """``body``: bytes, or what is sent as JSON. A header of None is left out."""
        return await self.send(self.request(method, path, body, **headers))

    async def post(self, path, body=None, **headers) -> Answer:
        return await self.ask("POST", path, {} if body is None else body, **headers)

    async def get(self, path, **headers) -> Answer:
        return await self.ask("GET", path, **headers)

    def request(self, method, path, body=None, **headers) -> bytes:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"host": f"127.0.0.1:{self.port}", "connection": "close"}
        if body is not None:
            given |= {"content-type": "application/json", "content-length": str(len(data))}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in given.items() if v is not None)]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


async def read_answer(reader) -> Answer:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, value in (each.split(": ", 1) for each in lines if each)}
    if "content-length" in headers:
        try:
            body = await reader.readexactly(int(headers["content-length"]))
        except asyncio.IncompleteReadError as cut:
            body = cut.partial
    else:
        body = b""
        while size := int(await asyncio.wait_for(reader.readline(), 20), 16):
            body += (await reader.readexactly(size + 2))[:-2]
    return Answer(int(line.split()[1]), headers, body)


@pytest.fixture
async def start(model_info, tiny_tokenizer, tmp_path):
    """``await start(names=(), **settings)``: a door of a server of its own."""
    servers = []

    async def make(names=(), **settings):
        engine, door = Engine(model_info, tiny_tokenizer), HttpDoor("127.0.0.1", 0, names)
        settings = {"grace": 0.0, **settings}
        config = ServerConfig(listen="127.0.0.1:0", **settings)
        registry = Registry()
        admin = (
            OperatorAdmin(config, Store(tmp_path / "store"), registry, model_info) if config.operator_admin else None
        )
        server = SteerServer(engine, registry, config, (door,), admin=admin)
        target = f"127.0.0.1:{await server.start()}"
        servers.append(server)
        return Doorway(engine, server, door.port, target)

    yield make
    for server in servers:
        await server.stop()


@pytest.fixture
async def door(start):
    """One with usual settings."""
    return await start()


@pytest.fixture
def logged():
    with structlog.testing.capture_logs() as lines:
        yield lines
