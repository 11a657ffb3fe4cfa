import asyncio
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import steer_client
from google.rpc import error_details_pb2, status_pb2
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.registry import Collector
from steer_client import AsyncSteerClient, OperatorUse, SteerClient

from steer_server import errors
from steer_server.config import ServerConfig
from steer_server.engine.work import WorkDone
from steer_server.errors import EngineDiedError, SteerServerError
from steer_server.metrics import Metrics
from steer_server.rpc.server import SteerServer
from steer_server.rpc.status import DOMAIN, TABLE, code_of, status_of
from steer_server.types import ModelInfo

# Each server error, the SDK's exception that it arrives as, and what must survive the way.
ERRORS: dict[SteerServerError, tuple[type[steer_client.SteerError], dict[str, Any]]] = {
    errors.InvalidRequestError("sampling.top_p", "is 7"): (
        steer_client.InvalidRequestError,
        {"field": "sampling.top_p"},
    ),
    errors.PromptTooLongError(900, 256): (steer_client.PromptTooLongError, {"field": "prompt"}),
    errors.DoseTooHighError("operators", layer=15, dose=1.35, max_dose=1.0, parts=("a 0.9", "b 0.45")): (
        steer_client.DoseTooHighError,
        {"field": "operators", "metadata": {"layer": "15", "dose": "1.35", "max_dose": "1.0"}},
    ),
    errors.UnknownOperatorError("gölden", ("a", "b")): (steer_client.UnknownOperatorError, {"name": "gölden"}),
    errors.OperatorUnusableError("broken", "it is damaged"): (steer_client.OperatorUnusableError, {"name": "broken"}),
    errors.DigestNotServedError("swapped", requested="sha256:1", served="sha256:2"): (
        steer_client.DigestNotServedError,
        {"name": "swapped", "metadata": {"requested": "sha256:1", "served": "sha256:2"}},
    ),
    errors.QueueFullError("32 requests wait already", 2.25): (steer_client.ServerBusyError, {"retry_after": 2.25}),
    errors.UnauthenticatedError("the token is not accepted", cause="unknown token"): (
        steer_client.UnauthenticatedError,
        # A client without a token says where it could have one from.
        {"says more": True},
    ),
    errors.PermissionDeniedError("needs the scope admin", cause="scope"): (steer_client.PermissionDeniedError, {}),
    errors.RateLimitedError("too often", 2.25, cause="requests per minute"): (
        steer_client.ServerBusyError,
        {"retry_after": 2.25},
    ),
    errors.SteeringNotAppliedError("layer 3 was not reached"): (steer_client.SteeringNotAppliedError, {}),
    # Nothing is wrong with the operator that a caller named, if any.
    errors.StoreUnreadableError("store x is not a directory"): (steer_client.ServerError, {}),
    errors.StoreUnwritableError("store x: permission denied"): (steer_client.ServerError, {}),
    errors.StoreFullError("no space left"): (steer_client.StoreFullError, {}),
    errors.OperatorExistsError("taken", "sha256:1"): (
        steer_client.OperatorExistsError,
        {"name": "taken", "metadata": {"found": "sha256:1"}},
    ),
    errors.OperatorChangedError("swapped", expected="sha256:1", found="sha256:2"): (
        steer_client.OperatorChangedError,
        {"name": "swapped", "metadata": {"expected": "sha256:1", "found": "sha256:2"}},
    ),
    # The SDK goes on where the server stands, or begins.
    errors.UnknownUploadError("a"): (steer_client.ServerError, {}),
    errors.UnknownBuildError("a"): (steer_client.UnknownBuildError, {}),
    errors.UploadOffsetError("7 bytes are held", received=7): (
        steer_client.ServerError,
        {"metadata": {"received_bytes": "7"}},
    ),
    errors.EngineFailedError("out of memory"): (steer_client.EngineFailedError, {}),
    errors.TimeLimitError(2.5): (steer_client.DeadlineExceededError, {}),
    errors.RequestIncompleteError(30.0): (steer_client.DeadlineExceededError, {}),
    errors.SlowReaderError(30.0): (steer_client.DeadlineExceededError, {}),
    errors.LoadingError(): (steer_client.ServerUnavailableError, {}),
    errors.ShuttingDownError(): (steer_client.ServerUnavailableError, {}),
    errors.UnimplementedError("grpc.health.v1.Health/List"): (steer_client.ServerError, {}),
}
_CASES = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


def _subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


@dataclass
class _BrokenEngine:
    """Fails every request with the error that a test gives it."""

    model: ModelInfo
    tokenizer: Any
    error: BaseException | None = None
    running: int = 0
    waiting: int = 0
    undelivered: int = 0
    collectors: tuple[Collector, ...] = ()
    work: WorkDone = field(default_factory=WorkDone)
    closed: list[bool] = field(default_factory=list)
    dead: asyncio.Event = field(default_factory=asyncio.Event)

    async def encode(self, prompt: object) -> tuple[int, ...]:
        raise self.error

    async def failed(self) -> str:
        await self.dead.wait()
        return "all of it broke"

    async def close(self) -> None:
        self.closed.append(True)


class _EmptyRegistry:
    def entries(self) -> tuple[()]:
        return ()

    def reload(self) -> None: ...

    async def plan_beside(self, groups: object) -> tuple[None]:
        return (None,)


@pytest.fixture
async def broken(model_info, tiny_tokenizer):
    engine = _BrokenEngine(model_info, tiny_tokenizer)
    server = SteerServer(engine, _EmptyRegistry(), ServerConfig(listen="127.0.0.1:0", grace=0.0))
    port = await server.start()
    yield engine, f"127.0.0.1:{port}"
    await server.stop()


def _details(caught, kind):
    """The detail of a kind in the status as it came over the wire."""
    status = status_pb2.Status.FromString(dict(caught.__cause__.trailing_metadata())["grpc-status-details-bin"])
    for packed in status.details:
        message = kind()
        if packed.Unpack(message):
            return message
    return None


def _check(error, caught):
    kind, expected = ERRORS[error]
    assert type(caught) is kind
    assert str(caught).startswith(str(error))
    assert str(caught) == str(error) or "says more" in expected
    assert (caught.code, caught.reason) == TABLE[type(error)]
    assert _details(caught, error_details_pb2.ErrorInfo).domain == DOMAIN
    for name in ("field", "retry_after", "metadata"):
        if name in expected:
            assert getattr(caught, name) == expected[name]
    if "name" in expected:
        assert _details(caught, error_details_pb2.ResourceInfo).resource_name == expected["name"]
        assert expected["name"] in str(caught)


def test_every_error_has_its_line_in_the_table():
    assert set(TABLE) == set(_subclasses(SteerServerError))


def test_every_error_is_in_the_picture_of_the_table():
    import steer_server.rpc.status as module

    lines = re.findall(r"^(\w+Error)\s+([A-Z_]+)\s+([A-Z_]+)", module.__doc__, flags=re.MULTILINE)
    assert lines == [(kind.__name__, code.name, reason) for kind, (code, reason) in TABLE.items()]


def test_every_error_is_sent_in_these_tests():
    assert {type(error) for error in ERRORS} == set(TABLE)


def test_every_reason_belongs_to_one_error():
    assert len({reason for _, reason in TABLE.values()}) == len(TABLE)


@_CASES
def test_an_error_has_the_status_of_its_line(error):
    code, _ = TABLE[type(error)]
    assert code_of(error) is code
    assert status_of(error).code is code


@_CASES
async def test_an_error_reaches_the_async_client_as_its_exception(broken, error):
    engine, target = broken
    engine.error = error
    use = [OperatorUse("g")]
    async with AsyncSteerClient(target, retry=False) as client:
        for call in (client.generate("x"), client.compare("x", operators=use), client.tokenize("x")):
            with pytest.raises(steer_client.SteerError) as caught:
                await call
            _check(error, caught.value)
        with pytest.raises(steer_client.SteerError) as caught:
            async for _ in client.stream("x"):
                pass
        _check(error, caught.value)


@_CASES
async def test_an_error_reaches_the_blocking_client_as_its_exception(broken, error):
    engine, target = broken
    engine.error = error

    def calls():
        with SteerClient(target, retry=False) as client:
            for call in (
                lambda: client.generate("x"),
                lambda: list(client.stream("x")),
                lambda: client.compare("x", operators=[OperatorUse("g")]),
                lambda: client.tokenize("x"),
            ):
                with pytest.raises(steer_client.SteerError) as caught:
                    call()
                _check(error, caught.value)

    await asyncio.to_thread(calls)


async def test_a_bug_in_the_server_arrives_as_a_failed_engine_without_its_details(broken):
    engine, target = broken
    engine.error = ZeroDivisionError("a secret")
    async with AsyncSteerClient(target, retry=False) as client:
        with pytest.raises(steer_client.EngineFailedError) as caught:
            await client.generate("x")
    assert "ZeroDivisionError" in str(caught.value)
    assert "secret" not in str(caught.value)


_LONG = {
    "wide characters": errors.EngineFailedError("東京\n" * 5000),
    "an invalid value": errors.InvalidRequestError("sampling.top_p", "is " + "\n東" * 5000),
    "many operators": errors.UnknownOperatorError("x", tuple(f"operator-number-{number}" for number in range(2000))),
    "a long name": errors.UnknownOperatorError("東" * 50_000, ()),
    "a long problem": errors.OperatorUnusableError("東" * 64, "bad \n" * 5000),
}


@pytest.mark.parametrize("error", _LONG.values(), ids=_LONG)
async def test_a_message_of_any_length_and_alphabet_crosses(broken, error):
    engine, target = broken
    engine.error = error
    async with AsyncSteerClient(target, retry=False) as client:
        # Between its soft and its hard limit gRPC refuses large metadata by chance, so once proves nothing.
        for _ in range(20):
            with pytest.raises(steer_client.SteerError) as caught:
                await client.generate("x")
            assert (caught.value.code, caught.value.reason) == TABLE[type(error)]
            text = str(caught.value)
            assert text.endswith("…")
            assert str(error).startswith(text[:-1])
            assert len(text) > 300


@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "Tokenize"])
async def test_bytes_that_are_no_message_are_an_invalid_request(broken, method):
    _, target = broken
    async with grpc.aio.insecure_channel(target) as channel:
        path = f"/steering.v1.GenerationService/{method}"
        garbage = b"\xff\xff\xff\xff"
        if method == "GenerateStream":
            answer = channel.unary_stream(path)(garbage).read()
        else:
            answer = channel.unary_unary(path)(garbage)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"is no {'Tokenize' if method == 'Tokenize' else 'Generate'}Request" in caught.value.details()


async def test_stopping_closes_the_engine(model_info, tiny_tokenizer):
    engine = _BrokenEngine(model_info, tiny_tokenizer)
    server = SteerServer(engine, _EmptyRegistry(), ServerConfig(listen="127.0.0.1:0", grace=0.0))
    await server.start()
    await server.stop()
    assert engine.closed == [True]


async def test_a_server_whose_engine_died_stops_and_says_why(model_info, tiny_tokenizer):
    engine = _BrokenEngine(model_info, tiny_tokenizer, error=errors.EngineFailedError("it broke"))
    server = SteerServer(engine, _EmptyRegistry(), ServerConfig(listen="127.0.0.1:0", grace=0.0))
    target = f"127.0.0.1:{await server.start()}"
    serving = asyncio.ensure_future(server.serve_until_signalled())
    async with AsyncSteerClient(target, retry=False) as client:
        assert await client.health()
        with pytest.raises(steer_client.EngineFailedError):
            await client.generate("x")
    assert not serving.done()
    engine.dead.set()
    with pytest.raises(EngineDiedError, match="all of it broke"):
        await asyncio.wait_for(serving, 10)
    assert engine.closed == [True]
    async with AsyncSteerClient(target, retry=False) as client:
        with pytest.raises(steer_client.ServerUnavailableError):
            await client.generate("x")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_server_that_is_signalled_stops_without_an_error(model_info, tiny_tokenizer, number):
    engine = _BrokenEngine(model_info, tiny_tokenizer)
    server = SteerServer(engine, _EmptyRegistry(), ServerConfig(listen="127.0.0.1:0", grace=0.0))
    await server.start()
    serving = asyncio.ensure_future(server.serve_until_signalled())
    await asyncio.sleep(0.05)
    signal.raise_signal(number)
    await asyncio.wait_for(serving, 10)
    assert engine.closed == [True]


def test_the_engines_own_metrics_are_shown_with_those_of_the_server(model_info, tiny_tokenizer):
    own = CollectorRegistry()
    Gauge("engine_depth", "Of its own", registry=own).set(7)
    metrics = Metrics(_BrokenEngine(model_info, tiny_tokenizer, collectors=(own,)), _EmptyRegistry())
    assert metrics.registry.get_sample_value("engine_depth") == 7
    assert metrics.registry.get_sample_value("steer_jobs_running") == 0
