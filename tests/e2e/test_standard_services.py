"""The server as strangers see it: standard health, reflection and metrics, and clients that never saw the contract."""

import base64
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from steer_client import InvalidRequestError, OperatorUse, SamplingParams, SteerClient, UnknownOperatorError

BUF = Path(sys.executable).parent / "buf"
SERVICES = ("steering.v1.GenerationService", "steering.v1.OperatorService")
HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
GENERATE = "steering.v1.GenerationService/Generate"
COMPARE = "steering.v1.GenerationService/Compare"
REQUEST = {
    "prompt": {"text": "the golden gate"},
    "sampling": {"maxTokens": 4, "ignoreEos": True},
    "operators": [{"name": "golden", "strength": 0.5}],
}
COMPARISON = {
    "prompt": {"text": "the golden gate"},
    "sampling": {"maxTokens": 4, "ignoreEos": True},
    "arms": [{"name": "loud", "operators": [{"name": "golden", "strength": 0.5}]}],
}
STATUS = health_pb2.HealthCheckResponse


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.target) as made:
        yield made


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_each_service_is_healthy(channel, service):
    request = health_pb2.HealthCheckRequest(service=service)
    assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status == STATUS.SERVING


def test_a_service_that_does_not_exist_has_no_health(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="no.such.Service")
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(request, timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(request, timeout=10)
    assert next(watch).status == STATUS.SERVICE_UNKNOWN
    watch.cancel()


def test_who_watches_is_told_that_the_server_stops(start_tiny):
    with start_tiny("--grace", "1") as server, grpc.insecure_channel(server.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [
            stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=30) for service in ("", *SERVICES)
        ]
        assert [next(watch).status for watch in watches] == [STATUS.SERVING] * 3
        server.signal(signal.SIGTERM)
        assert [next(watch).status for watch in watches] == [STATUS.NOT_SERVING] * 3
        assert server.exit_code(10) == 0
        assert "Traceback" not in "\n".join(server.log)


def test_reflection_lists_the_services(channel):
    assert set(ProtoReflectionDescriptorDatabase(channel).get_services()) == {*SERVICES, HEALTH, REFLECTION}


@pytest.fixture
def generic(channel):
    """Calls a method with a JSON-like request, knowing nothing but what reflection says."""
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))

    def call(path, request):
        service, _, name = path.rpartition("/")
        method = pool.FindServiceByName(service).FindMethodByName(name)
        answer = GetMessageClass(method.output_type)
        kind = channel.unary_stream if method.server_streaming else channel.unary_unary
        multi = kind(
            f"/{path}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        message = GetMessageClass(method.input_type)()
        ParseDict(request, message, descriptor_pool=pool)
        found = multi(message, timeout=30)
        return [MessageToDict(each) for each in found] if method.server_streaming else MessageToDict(found)

    return call


def _check_generation(answer):
    assert len(answer["tokenIds"]) == 4
    assert answer["finishReason"] == "FINISH_REASON_MAX_TOKENS"
    (receipt,) = answer["receipts"]
    assert receipt["operator"] == "golden"
    assert receipt["generatedTokensSteered"] == 3
    assert receipt["meanDose"] == pytest.approx(0.25, abs=1e-4)


def _check_comparison(events):
    assert [event["arm"] for event in events[:2]] == ["normal", "loud"]
    assert all("started" in event for event in events[:2])
    finished = {event["arm"]: event["finished"] for event in events if "finished" in event}
    assert set(finished) == {"normal", "loud"}
    _check_generation(finished["loud"])
    assert "receipts" not in finished["normal"]
    for arm, result in finished.items():
        deltas = [event["delta"] for event in events if event.get("arm") == arm and "delta" in event]
        assert "".join(delta.get("text", "") for delta in deltas) == result.get("text", "")
    (comparison,) = events[-1]["compared"]["comparisons"]
    assert comparison["arm"] == "loud"
    assert len(comparison["klPerToken"]) == 4
    assert comparison["klMean"] == pytest.approx(sum(comparison["klPerToken"]) / 4)
    assert comparison["normalPerplexity"] >= 1
    assert comparison["steeredPerplexity"] >= 1


def test_a_client_made_of_reflection_alone_generates(generic):
    _check_generation(generic(GENERATE, REQUEST))


def test_a_client_made_of_reflection_alone_compares(generic):
    _check_comparison(generic(COMPARE, COMPARISON))


@pytest.fixture(scope="module")
def buf(server, tmp_path_factory):
    """``buf curl`` against the server, in a folder without any .proto."""
    folder = tmp_path_factory.mktemp("buf")

    def run(path, *options):
        command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *options]
        url = f"http://{server.target}/{path}" if path else f"http://{server.target}"
        return subprocess.run(
            [*command, url],
            cwd=folder,
            env={"HOME": str(folder), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def _documents(text):
    decoder, documents = json.JSONDecoder(), []
    while text := text.strip():
        document, end = decoder.raw_decode(text)
        documents.append(document)
        text = text[end:]
    return documents


def test_buf_curl_lists_the_services_and_their_methods(buf):
    listed = buf("", "--list-services")
    assert listed.returncode == 0, listed.stderr
    assert set(listed.stdout.split()) == {*SERVICES, HEALTH, REFLECTION}
    listed = buf("", "--list-methods")
    assert {GENERATE, COMPARE, "steering.v1.OperatorService/ListOperators"} <= set(listed.stdout.split())


def test_buf_curl_generates(buf):
    done = buf(GENERATE, "-d", json.dumps(REQUEST))
    assert done.returncode == 0, done.stderr
    (answer,) = _documents(done.stdout)
    _check_generation(answer)


def test_buf_curl_compares(buf):
    done = buf(COMPARE, "-d", json.dumps(COMPARISON))
    assert done.returncode == 0, done.stderr
    _check_comparison(_documents(done.stdout))


def test_buf_curl_sees_the_health(buf):
    done = buf(f"{HEALTH}/Check", "-d", json.dumps({"service": SERVICES[0]}))
    assert done.returncode == 0, done.stderr
    assert _documents(done.stdout) == [{"status": "SERVING"}]


def test_buf_curl_reads_the_details_of_an_error(buf):
    request = REQUEST | {"sampling": {"topP": 7}}
    done = buf(GENERATE, "-d", json.dumps(request))
    assert done.returncode != 0
    assert "invalid_argument" in done.stderr
    assert "sampling.top_p" in done.stderr
    (info,) = (
        error_details_pb2.ErrorInfo.FromString(base64.b64decode(detail["value"] + "=="))
        for detail in json.loads(done.stderr)["details"]
        if detail["type"] == "google.rpc.ErrorInfo"
    )
    assert (info.reason, info.domain) == ("INVALID_REQUEST", "steering.v1")


def _calls(server, method, code):
    return server.sample("grpc_server_handled_total", grpc_method=method, grpc_code=code)


def test_calls_are_counted_by_their_status(server):
    expected = {
        ("Generate", "OK"): 2,
        ("Generate", "NOT_FOUND"): 1,
        ("Generate", "INVALID_ARGUMENT"): 1,
        ("GenerateStream", "OK"): 1,
        ("GenerateStream", "NOT_FOUND"): 1,
        ("Compare", "OK"): 1,
        ("Tokenize", "OK"): 1,
        ("GetModelInfo", "OK"): 1,
        ("ListOperators", "OK"): 1,
        ("GetOperator", "NOT_FOUND"): 1,
        ("Check", "OK"): 1,
    }
    before = {key: _calls(server, *key) for key in expected}
    all_before = server.sample("grpc_server_handled_total"), server.sample("grpc_server_started_total")
    short = SamplingParams(max_tokens=2, ignore_eos=True)
    unknown = [OperatorUse("nothing")]
    with SteerClient(server.target, timeout=30) as client:
        for _ in range(2):
            client.generate("x", sampling=short)
        with pytest.raises(UnknownOperatorError):
            client.generate("x", operators=unknown)
        with pytest.raises(InvalidRequestError):
            client.generate("")
        list(client.stream("x", sampling=short))
        with pytest.raises(UnknownOperatorError):
            list(client.stream("x", operators=unknown))
        client.compare("x", operators=[OperatorUse("golden")], sampling=short)
        client.tokenize("x")
        client.model_info()
        client.operators()
        with pytest.raises(UnknownOperatorError):
            client.operator("nothing")
        client.health()
    assert {key: _calls(server, *key) - before[key] for key in expected} == expected
    total = sum(expected.values())
    assert server.sample("grpc_server_handled_total") - all_before[0] == total
    assert server.sample("grpc_server_started_total") - all_before[1] == total
    assert server.sample("grpc_server_handling_seconds_count") == server.sample("grpc_server_handled_total")


def test_what_steering_did_adds_up(server):
    names = {
        "requests": ("steer_requests_total", {}),
        "prompt": ("steer_prompt_tokens_total", {}),
        "between tokens": ("steer_inter_token_seconds_count", {}),
        "plain": ("steer_generated_tokens_total", {"steered": "false"}),
        "steered": ("steer_generated_tokens_total", {"steered": "true"}),
        "plain texts": ("steer_completions_total", {"steered": "false", "reason": "MAX_TOKENS"}),
        "steered texts": ("steer_completions_total", {"steered": "true", "reason": "MAX_TOKENS"}),
        "golden": ("steer_positions_steered_total", {"operator": "golden"}),
        "dress": ("steer_positions_steered_total", {"operator": "dress"}),
        "doses": ("steer_dose_ratio_count", {}),
        "dose": ("steer_dose_ratio_sum", {}),
        "first tokens": ("steer_time_to_first_token_seconds_count", {}),
        "queued": ("steer_queue_seconds_count", {}),
    }

    def read():
        return {key: server.sample(name, **labels) for key, (name, labels) in names.items()}

    before = read()
    five = SamplingParams(max_tokens=5, ignore_eos=True)
    with SteerClient(server.target, timeout=30) as client:
        prompt = client.generate("the bay", sampling=five).usage.prompt_tokens
        both = [OperatorUse("golden", 0.5), OperatorUse("dress", 1.0)]
        client.generate("the bay", operators=both, sampling=five)
        list(client.stream("the bay", operators=[OperatorUse("golden", 0.0)], sampling=five))
        client.compare("the bay", operators=[OperatorUse("golden", 0.5)], sampling=five)
    found = {key: value - before[key] for key, value in read().items()}
    steered = prompt + 4
    assert found.pop("dose") == pytest.approx(0.25 + 0.5 + 0.25, abs=1e-4)
    assert found == {
        # A comparison is one request with one prompt, however many texts it has.
        "requests": 4,
        "prompt": 4 * prompt,
        "plain": 10,
        "steered": 15,
        "plain texts": 2,
        "steered texts": 3,
        "golden": 2 * steered,
        "dress": steered,
        "doses": 3,
        "first tokens": 4,
        "queued": 4,
        "between tokens": 5 * 4,
    }
    assert server.sample("steer_operators") == 2
    assert server.sample("steer_operators_unusable") == 0
    assert server.sample("steer_model_info") == 1


def test_metrics_are_read_while_a_text_is_written(server):
    seen = threading.Event()
    with SteerClient(server.target, timeout=30) as client:
        for _ in client.stream("the bay", sampling=SamplingParams(max_tokens=4000, ignore_eos=True)):
            assert server.jobs() == (1, 0)
            seen.set()
            break
    assert seen.is_set()
    server.wait_for_jobs(0, 0)


def test_a_text_that_was_scored_is_counted_as_read_and_not_as_generated(server):
    names = {
        "calls": ("grpc_server_handled_total", {"grpc_method": "Score", "grpc_code": "OK"}),
        "requests": ("steer_requests_total", {}),
        "read": ("steer_prompt_tokens_total", {}),
        "generated": ("steer_generated_tokens_total", {}),
        "plain": ("steer_completions_total", {"steered": "false", "reason": "SCORED"}),
        "steered": ("steer_completions_total", {"steered": "true", "reason": "SCORED"}),
        "golden": ("steer_positions_steered_total", {"operator": "golden"}),
        "first tokens": ("steer_time_to_first_token_seconds_count", {}),
        "queued": ("steer_queue_seconds_count", {}),
    }

    def read():
        return {key: server.sample(name, **labels) for key, (name, labels) in names.items()}

    before = read()
    with SteerClient(server.target, timeout=30) as client:
        found = client.score(" of the bay", prompt="the bay", arms={"golden": {"golden": 0.5}})
    fed = len(found.prompt_token_ids) + len(found.token_ids) - 1
    (receipt,) = found.steered["golden"].receipts
    assert receipt.prompt_tokens_steered + receipt.generated_tokens_steered == fed
    assert found.normal.kl_mean == 0.0 < found.steered["golden"].kl_mean
    expected = {"calls": 1, "requests": 1, "read": fed, "generated": 0, "plain": 1, "steered": 1, "golden": fed}
    assert {key: value - before[key] for key, value in read().items()} == expected | {"first tokens": 0, "queued": 1}
