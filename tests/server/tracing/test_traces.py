"""One trace of a call, from the client through the queue and the engine; and nothing in it that clients keep secret."""

import asyncio
import gc
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from itertools import pairwise

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from steer_client import AsyncSteerClient, InvalidRequestError, OperatorUse, SamplingParams, SteerError

from operators.core.store import Store
from steer_server.checks.traces import check_traces
from steer_server.config import ServerConfig
from steer_server.engine.hf.engine import HFEngine
from steer_server.errors import StartupError
from steer_server.http.door import HttpDoor
from steer_server.registry import Registry
from steer_server.rpc.server import SteerServer
from steer_server.tracing.base import NO_TRACING, Ending
from steer_server.tracing.export import choose_tracing
from steer_server.tracing.otel import MAX_TEXT_SPANS, OtelTracing
from steer_server.types import Delta, Started

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "the golden bridge"


class Traced:
    """A server, a client of it, and what was traced."""

    def __init__(self, client: AsyncSteerClient, door: HttpDoor, exporter: InMemorySpanExporter, digest: str) -> None:
        self.client, self.door, self.exporter, self.digest = client, door, exporter, digest

    def spans(self) -> dict[str, list[ReadableSpan]]:
        """By name, in the order of their ends."""
        found: dict[str, list[ReadableSpan]] = {}
        for span in self.exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found

    async def post(self, path: str, body: object, **headers: str) -> int:
        url = f"http://127.0.0.1:{self.door.port}{path}"
        head = {"content-type": "application/json", **headers}
        request = urllib.request.Request(url, json.dumps(body).encode(), head)

        def send() -> int:
            try:
                with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
                    answer.read()
                    return answer.status
            except urllib.error.HTTPError as error:
                return error.code

        return await asyncio.to_thread(send)


@pytest.fixture
async def traced(llama, artifact, tmp_path):
    Store(tmp_path).save("golden", artifact)
    engine, exporter, door = HFEngine(llama, max_queue=8), InMemorySpanExporter(), HttpDoor("127.0.0.1", 0)
    registry = Registry(Store(tmp_path), engine.model, max_bytes=1 << 30, max_dose=1.0)
    tracing = OtelTracing(engine.model.model, SimpleSpanProcessor(exporter))
    server = SteerServer(engine, registry, ServerConfig(listen="127.0.0.1:0", grace=0.0), (door,), tracing=tracing)
    port = await server.start()
    async with AsyncSteerClient(f"127.0.0.1:{port}", timeout=60) as client:
        yield Traced(client, door, exporter, artifact.digest)
    await server.stop()


async def test_a_call_of_the_sdk_is_one_trace_through_queue_and_engine(traced, llama):
    tracer = TracerProvider().get_tracer("a program")
    before = time.time_ns()
    with tracer.start_as_current_span("experiment") as outer:
        sampling = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.5, seed=7)
        text = await traced.client.generate(
            SECRET, operators=[OperatorUse("golden", 0.4)], sampling=sampling, request_id="mine"
        )
    spans = traced.spans()
    [call], [written] = spans["steering.v1.GenerationService/Generate"], spans[f"text_completion {llama.name}"]
    steps = [spans[name][0] for name in ("queue", "prefill", "decode")]
    assert set(spans) == {call.name, written.name, "queue", "prefill", "decode"}
    assert {span.context.trace_id for name in spans for span in spans[name]} == {outer.get_span_context().trace_id}
    assert call.parent.span_id == outer.get_span_context().span_id
    assert (call.parent.is_remote, call.kind) == (True, SpanKind.SERVER)
    assert written.parent.span_id == call.context.span_id
    assert {step.parent.span_id for step in steps} == {written.context.span_id}
    # One after the other, all within the text, which is within the call.
    times = [time for step in steps for time in (step.start_time, step.end_time)]
    ordered = [before, call.start_time, written.start_time, *times, written.end_time, call.end_time, time.time_ns()]
    # Of two clocks, read one after the other.
    assert all(a <= b + 1_000_000 for a, b in pairwise(ordered))
    [receipt] = text.receipts
    assert call.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "steering.v1.GenerationService/Generate",
        "rpc.response.status_code": "OK",
        "steer.request_id": "mine",
        "steer.texts": 1,
    }
    assert written.attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "steering-operators",
        "gen_ai.request.model": llama.name,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.seed": 7,
        "gen_ai.response.id": "mine",
        "gen_ai.response.finish_reasons": ("MAX_TOKENS",),
        "gen_ai.response.time_to_first_chunk": pytest.approx(text.timings.time_to_first_token, abs=1e-5),
        "gen_ai.usage.input_tokens": text.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": 5,
        "steer.sample": 0,
        "steer.operator.names": ("golden",),
        "steer.operator.digests": (traced.digest,),
        "steer.operator.strengths": (pytest.approx(0.4),),
        "steer.operator.layers": (receipt.layer,),
        "steer.operator.positions_steered": (receipt.prompt_tokens_steered + receipt.generated_tokens_steered,),
    }


async def test_metadata_of_the_callers_own_goes_along_and_may_name_another_trace(traced):
    target = traced.client.target
    with TracerProvider().get_tracer("a program").start_as_current_span("experiment") as outer:
        for metadata in ({"x-proxy": "hush"}, {"traceparent": PARENT}):
            async with AsyncSteerClient(target, metadata=metadata) as client:
                await client.model_info()
    ours, theirs = traced.spans()["steering.v1.GenerationService/GetModelInfo"]
    assert ours.parent.span_id == outer.get_span_context().span_id
    assert f"{theirs.context.trace_id:032x}" in PARENT
    assert "hush" not in ours.to_json()


async def test_every_text_of_a_comparison_and_every_arm_of_a_score_has_a_span(traced, llama):
    arms = {"private arm": [OperatorUse("golden", 0.4)], "cold": [OperatorUse("golden", -0.2)]}
    await traced.client.compare(SECRET, arms=arms, sampling=SamplingParams(max_tokens=3, ignore_eos=True), n=2)
    await traced.client.score(" in the bay", prompt=SECRET, arms=arms)
    spans = traced.spans()
    strengths = [
        [span.attributes.get("steer.operator.strengths") for span in spans[f"{kind} {llama.name}"]]
        for kind in ("text_completion", "score")
    ]
    assert [sorted(round(found[0], 3) if found else 0 for found in each) for each in strengths] == [
        [-0.2, -0.2, 0, 0, 0.4, 0.4],
        [-0.2, 0, 0.4],
    ]
    said = json.dumps([json.loads(span.to_json()) for name in spans for span in spans[name]])
    assert "golden" in said
    assert SECRET not in said
    assert "bay" not in said
    assert "private" not in said


async def test_the_http_door_continues_a_trace_and_calls_the_same_spans(traced, llama):
    body = {"model": f"{llama.name}+golden", "prompt": SECRET, "max_tokens": 3}
    assert await traced.post("/v1/completions", body, traceparent=PARENT, authorization="Bearer hush") == 200
    chat = {"model": llama.name, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 3}
    assert await traced.post("/v1/chat/completions", chat) == 400  # The model has no template.
    spans = traced.spans()
    [call], [refused] = spans["POST /v1/completions"], spans["POST /v1/chat/completions"]
    assert f"{call.context.trace_id:032x}" in PARENT
    assert call.attributes["http.response.status_code"] == 200
    assert call.attributes["http.route"] == "/v1/completions"
    [written] = spans[f"text_completion {llama.name}"]
    assert written.parent.span_id == call.context.span_id
    assert written.attributes["steer.operator.names"] == ("golden",)
    assert refused.attributes["error.type"] == "INVALID_REQUEST"
    assert "hush" not in "".join(span.to_json() for name in spans for span in spans[name])


async def test_errors_are_recorded_by_reason_and_never_by_what_was_sent(traced):
    with pytest.raises(InvalidRequestError):
        await traced.client.generate(SECRET, sampling=SamplingParams(max_tokens=1, stop_token_ids=[10**6]))
    with pytest.raises(SteerError):
        await traced.client.generate(SECRET, operators=[OperatorUse("nobody's")])
    invalid, unknown = traced.spans()["steering.v1.GenerationService/Generate"]
    assert invalid.attributes["error.type"] == "INVALID_REQUEST"
    assert invalid.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert unknown.attributes["error.type"] == "UNKNOWN_OPERATOR"
    # The fault is the client's.
    assert {invalid.status.status_code, unknown.status.status_code} == {StatusCode.UNSET}


async def test_a_text_that_is_left_amid_its_decoding_ends_with_its_call(traced, llama):
    sampling = SamplingParams(max_tokens=900, ignore_eos=True)
    stream = traced.client.stream(SECRET, operators=[OperatorUse("golden", 0.4)], sampling=sampling)
    await anext(aiter(stream))
    stream.cancel()
    async with asyncio.timeout(10):
        while not traced.spans():
            await asyncio.sleep(0.01)
    [written], [call] = traced.spans().values()
    assert written.attributes["error.type"] == call.attributes["error.type"] == "CANCELLED"
    assert written.attributes["steer.operator.digests"] == (traced.digest,)
    assert written.attributes["gen_ai.usage.output_tokens"] >= 1


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": "00-" + "g" * 32 + "-b7ad6b7169203331-01"},
        {"traceparent": "x" * 4000},
        {"traceparent": "00-" + "0" * 32 + "-b7ad6b7169203331-01"},
        {"traceparent": PARENT, "tracestate": "a secret" * 20},
        {"traceparent": PARENT, "tracestate": ",".join(f"k{n}=v" for n in range(400))},
        {"tracestate": "a=b", "baggage": "secret=x"},
    ],
)
async def test_a_context_that_is_none_neither_fails_a_call_nor_gets_into_the_log(traced, headers, caplog):
    async with grpc.aio.insecure_channel(traced.client.target) as channel:
        call = channel.unary_unary("/steering.v1.OperatorService/ListOperators")
        await call(b"", metadata=tuple(headers.items()))
    [span] = traced.spans()["steering.v1.OperatorService/ListOperators"]
    assert span.context.is_valid
    assert "secret" not in span.to_json()
    assert caplog.text == ""


def test_only_so_many_texts_of_a_call_have_spans():
    exporter = InMemorySpanExporter()
    call = OtelTracing("m", SimpleSpanProcessor(exporter)).begin("call", {}, tuple)
    for sample in range(MAX_TEXT_SPANS + 10):
        call.see(Started("id", (1, 2), (), sample))
        call.see(Delta("text", (3,), (), sample=sample))
    call.end(Ending(error_type="ENGINE_FAILED", is_fault=True))
    spans = exporter.get_finished_spans()
    assert len(spans) == MAX_TEXT_SPANS + 1
    assert spans[-1].attributes["steer.texts"] == MAX_TEXT_SPANS + 10
    assert {span.status.status_code for span in spans} == {StatusCode.ERROR}


class _Stuck(SpanExporter):
    """Of a collector that takes and never answers."""

    def __init__(self) -> None:
        self.may_end = threading.Event()

    def export(self, spans):
        self.may_end.wait(30)


def _num_spans() -> int:
    gc.collect()
    return sum(issubclass(type(each), ReadableSpan) for each in gc.get_objects())


async def test_a_collector_that_does_not_answer_holds_up_nobody_and_memory_stays_bounded():
    stuck = _Stuck()
    processor = BatchSpanProcessor(stuck, max_queue_size=32, max_export_batch_size=8, schedule_delay_millis=1)
    tracing, before = OtelTracing("m", processor), _num_spans()
    began = time.monotonic()
    for _ in range(2000):
        tracing.begin("call", {}, tuple).end(Ending())
    assert time.monotonic() - began < 5
    # In the queue, and in the batch that is being sent.
    assert _num_spans() - before <= 32 + 8
    began = time.monotonic()
    await tracing.close(0.2)
    assert time.monotonic() - began < 2
    stuck.may_end.set()


def test_what_the_environment_asks_for_is_had_or_named(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(StartupError, match=r"OTEL_EXPORTER_OTLP_PROTOCOL is 'http/json'; grpc and http/protobuf"):
        choose_tracing()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    choose_tracing()
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartupError, match=r"install 'steering-operators\[otel\]'"):
        choose_tracing()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(StartupError, match="'zipkin'; otlp is accepted"):
        choose_tracing()


def test_a_check_before_the_start_says_whether_traces_can_be_sent(monkeypatch):
    assert list(check_traces(ServerConfig())) == []
    assert [found.kind for found in check_traces(ServerConfig(traces=True))] == ["ok"]
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    [found] = check_traces(ServerConfig(traces=True))
    assert (found.kind, "'zipkin'" in found.said) == ("problem", True)


def test_without_traces_a_call_costs_next_to_nothing():
    began = time.process_time()
    for _ in range(10_000):
        call = NO_TRACING.begin("call", {}, tuple)
        call.see(Delta("text", (3,), ()))
        call.end(Ending())
    assert (time.process_time() - began) / 10_000 < 1e-4


async def test_a_threads_requests_belong_to_the_trace_of_who_starts_them():
    from steer_client._pool import ThreadPool

    async def current() -> int:
        return trace.get_current_span().get_span_context().trace_id

    pool = ThreadPool()
    with TracerProvider().get_tracer("a program").start_as_current_span("sweep") as span:
        pool.start(0, current())
    assert (await pool.next()).result == span.get_span_context().trace_id
