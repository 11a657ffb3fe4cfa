"""A scripted server: it answers what a test tells it to, so that every fault can be had at will."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from steer_client import AsyncSteerClient, OperatorUse, SteerClient
from steering.v1 import generation_pb2 as pb
from steering.v1 import generation_pb2_grpc, operators_pb2_grpc, score_pb2, text_pb2
from steering.v1 import operators_pb2 as ops
from steering.v1 import steering_pb2 as sp

from tests.client.certificates import Certificates
from tests.client.messages import (
    make_comparison,
    make_comparisons,
    make_events,
    make_receipt,
    make_response,
    sent,
    with_sample,
)


@dataclass
class Fault:
    """A status with the details that the contract promises."""

    code: grpc.StatusCode
    message: str = "it went wrong"
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    field_name: str = ""
    retry_after: float | None = None
    domain: str = "steering.v1"

    def abort(self, context: grpc.ServicerContext) -> None:
        details = []
        if self.reason:
            details.append(error_details_pb2.ErrorInfo(reason=self.reason, domain=self.domain, metadata=self.metadata))
        if self.field_name:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field_name, description="bad")
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after is not None:
            delay = Duration(seconds=int(self.retry_after), nanos=int(self.retry_after % 1 * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        if not details:
            context.abort(self.code, self.message)
        packed = []
        for detail in details:
            packed.append(AnyMessage())
            packed[-1].Pack(detail)
        status = status_pb2.Status(code=self.code.value[0], message=self.message, details=packed)
        context.abort_with_status(rpc_status.to_status(status))


class FakeServer:
    """Set what it answers; read what it was asked and whether the caller left."""

    def __init__(self) -> None:
        self.target = ""
        self.fault: Fault | None = None
        #: Of the next calls, one each, before they are answered.
        self.refusals: list[Fault] = []
        self.response = make_response()
        #: What every text with operators is, where it is not to be the truth or `response`.
        self.steered: text_pb2.GenerateResponse | None = None
        self.events: list | None = None
        #: From a request for a score to the answer.
        self.scored: Callable = score_pb2.ScoreResponse
        #: How many events to send before waiting for the caller to leave; None sends them all.
        self.hang_after: int | None = None
        self.listed = ops.ListOperatorsResponse()
        self.operator: ops.Operator | None = None
        self.model = pb.GetModelInfoResponse(model="tiny", num_layers=4, eos_token_ids=[2], has_chat_template=True)
        self.requests: list = []
        #: What came with each of them beside it.
        self.metadata: list[dict[str, str]] = []
        #: Who is answered; None: everybody.
        self.token: str | None = None
        self.left = threading.Event()
        self.health = health.HealthServicer()

    def text(self, request) -> text_pb2.GenerateResponse:
        return self.steered if self.steered is not None and request.operators else self.response

    def unary(self, request, context):
        self.watch(request, context)
        if self.hang_after is not None:
            self.left.wait(10)
        if self.fault:
            self.fault.abort(context)

    def stream(self, request, context, default):
        self.watch(request, context)
        events = default if self.events is None else self.events
        for i, event in enumerate(events):
            if i == self.hang_after:
                self.left.wait(10)
                return
            yield event
        if self.fault:
            self.fault.abort(context)

    def watch(self, request, context) -> None:
        # From the first moment: a caller who leaves early may never let the script come to its pause.
        if not context.add_callback(self.left.set):
            self.left.set()
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.token is not None and self.metadata[-1].get("authorization") != f"Bearer {self.token}":
            Fault(grpc.StatusCode.UNAUTHENTICATED, "the token is not known", "UNAUTHENTICATED").abort(context)
        if self.refusals:
            self.refusals.pop(0).abort(context)


class _Generation(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake

    def Generate(self, request, context):  # noqa: N802
        self.fake.unary(request, context)
        text = self.fake.text(request)
        if request.n > 1:
            text = with_sample(text, 0)
            text.more.extend(with_sample(text, sample) for sample in range(1, request.n))
        return text

    def GenerateStream(self, request, context):  # noqa: N802
        yield from self.fake.stream(request, context, make_events(self.fake.text(request)))

    def Compare(self, request, context):  # noqa: N802
        arms = {
            arm.name: self.fake.steered or make_response("one more", operators=arm.operators) for arm in request.arms
        }
        normal = None if request.HasField("normal") and not request.normal else self.fake.response
        default = make_comparison(normal, arms, scored=request.score, n=request.n or 1)
        if request.prompts:
            default = make_comparisons([prompt.id for prompt in request.prompts], default)
        yield from self.fake.stream(request, context, default)

    def Score(self, request, context):  # noqa: N802
        self.fake.unary(request, context)
        return self.fake.scored(request)

    def Tokenize(self, request, context):  # noqa: N802
        self.fake.unary(request, context)
        return pb.TokenizeResponse(token_ids=[1, 2], tokens=["a", " b"])

    def GetModelInfo(self, request, context):  # noqa: N802
        self.fake.unary(request, context)
        return self.fake.model


class _Operators(operators_pb2_grpc.OperatorServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake

    def ListOperators(self, request, context):  # noqa: N802
        self.fake.unary(request, context)
        return self.fake.listed

    def GetOperator(self, request, context):  # noqa: N802
        self.fake.unary(request, context)
        default = ops.Operator(name=request.name, recommended_rule=sp.RULE_CUMULATIVE)
        return ops.GetOperatorResponse(operator=self.fake.operator or default)

    def ReloadOperators(self, request, context):  # noqa: N802
        self.fake.unary(request, context)
        return ops.ReloadOperatorsResponse(added=["new"], unusable=["broken"])


@contextmanager
def _up(credentials: grpc.ServerCredentials | None = None):
    script = FakeServer()
    # What steer-server takes.
    options = [("grpc.max_receive_message_length", 16 << 20)]
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=options)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(_Generation(script), server)
    operators_pb2_grpc.add_OperatorServiceServicer_to_server(_Operators(script), server)
    health_pb2_grpc.add_HealthServicer_to_server(script.health, server)
    script.health.set("", health_pb2.HealthCheckResponse.SERVING)
    listen = "127.0.0.1:0"
    port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    script.target = f"127.0.0.1:{port}"
    server.start()
    yield script
    server.stop(grace=0).wait(5)


@pytest.fixture
def fake():
    """A scripted server that is up."""
    with _up() as script:
        yield script


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Files of two authorities that know nothing of each other."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tls_server():
    """`tls_server(credentials)`: a scripted server that is up, and speaks TLS."""
    with ExitStack() as stack:
        yield lambda credentials: stack.enter_context(_up(credentials))


@pytest.fixture
def pair():
    """Two scripted servers that are up."""
    with _up() as one, _up() as other:
        yield one, other


@pytest.fixture
def client(fake):
    with SteerClient(fake.target, timeout=20) as each:
        yield each


@pytest.fixture
async def async_client(fake):
    async with AsyncSteerClient(fake.target, timeout=20) as each:
        yield each


@pytest.fixture
def make():
    """The makers of messages, for tests that say what the server answers."""

    class Make:
        sent = staticmethod(sent)
        receipt = staticmethod(make_receipt)
        response = staticmethod(make_response)
        events = staticmethod(make_events)
        comparison = staticmethod(make_comparison)
        comparisons = staticmethod(make_comparisons)
        fault = Fault

    return Make


def _compared(options: dict) -> dict:
    """The options with something to compare, where a test does not care what."""
    return options if "arms" in options else {"operators": [OperatorUse("golden-gate")]} | options


def _sync(target: str, way: str, prompt, options: dict):
    with SteerClient(target, timeout=20, retry=False) as each:
        if way == "unary":
            return each.generate(prompt, **options)
        if way == "compare":
            return each.compare(prompt, **_compared(options))
        stream = each.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.result


async def _async(target: str, way: str, prompt, options: dict):
    async with AsyncSteerClient(target, timeout=20, retry=False) as each:
        if way == "unary":
            return await each.generate(prompt, **options)
        if way == "compare":
            return await each.compare(prompt, **_compared(options))
        stream = each.stream(prompt, **options)
        async for _ in stream:
            pass
        return stream.result


def _ways(*names: str) -> list:
    return [pytest.param((kind, way), id=f"{kind} {way}") for kind in ("sync", "async") for way in names]


def _caller(kind: str, way: str):
    def call(target: str, prompt="hello", **options):
        if kind == "sync":
            return _sync(target, way, prompt, options)
        return asyncio.run(_async(target, way, prompt, options))

    return call


@pytest.fixture(params=_ways("unary", "stream"))
def generate(request):
    """Every way to a Generation: `generate(target, prompt, **options)`."""
    return _caller(*request.param)


@pytest.fixture(params=_ways("unary", "stream", "compare"))
def any_call(request):
    """Every way to send a prompt."""
    return _caller(*request.param)


@pytest.fixture(params=_ways("compare"))
def compare(request):
    """Every way to an ABResult."""
    return _caller(*request.param)


@pytest.fixture(params=_ways("stream"))
def streamed(request):
    """Every way through a stream to a Generation."""
    return _caller(*request.param)
