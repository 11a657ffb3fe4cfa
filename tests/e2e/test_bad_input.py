"""Whatever a caller sends or a store holds, the error is typed and names the thing, and the server goes on serving."""

import math
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status
from steer_client import (
    Chat,
    ChatMessage,
    DoseTooHighError,
    FinishReason,
    InvalidRequestError,
    OperatorUse,
    Positions,
    PromptTooLongError,
    SamplingParams,
    ServerError,
    SteerClient,
    UnknownOperatorError,
)
from steering.v1 import generation_pb2 as pb
from steering.v1 import generation_pb2_grpc, operators_pb2, text_pb2
from steering.v1 import steering_pb2 as sp

BIN = Path(sys.executable).parent
GOLDEN = [OperatorUse("golden", 0.5)]
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)
LONG = SamplingParams(max_tokens=4000, ignore_eos=True)
"""Several seconds of work."""
OTHER = f"sha256:{'0' * 64}"


@pytest.fixture(autouse=True)
def serves_afterwards(server):
    """After every test here: a normal request is served as ever, and nothing runs or waits."""
    yield
    with SteerClient(server.target, timeout=20) as client:
        result = client.generate("the golden gate", operators=GOLDEN, sampling=SHORT)
    assert result.finish_reason is FinishReason.MAX_TOKENS
    assert result.receipts[0].generated_tokens_steered == 3
    server.wait_for_jobs(0, 0)


@pytest.mark.parametrize(
    ("arguments", "kind", "field", "words"),
    [
        ({"prompt": ""}, InvalidRequestError, "prompt.text", "empty"),
        ({"prompt": []}, InvalidRequestError, "prompt.token_ids", "empty"),
        ({"prompt": Chat(())}, InvalidRequestError, "prompt.chat.messages", "empty"),
        ({"prompt": "the bay " * 4096}, PromptTooLongError, "prompt", "4095"),
        ({"prompt": [5] * 4096}, PromptTooLongError, "prompt", "4096 tokens"),
        ({"prompt": [3, 100_000]}, InvalidRequestError, "prompt.token_ids[1]", "100000"),
        ({"prompt": [-1]}, InvalidRequestError, "prompt.token_ids[0]", "-1"),
        (
            {"operators": [OperatorUse("golden", math.nan)]},
            InvalidRequestError,
            "operators[0].strength",
            "strength: is nan",
        ),
        (
            {"operators": [OperatorUse("golden", math.inf)]},
            InvalidRequestError,
            "operators[0].strength",
            "strength: is inf",
        ),
        (
            {"operators": [OperatorUse("golden", -math.inf)]},
            InvalidRequestError,
            "operators[0].strength",
            "strength: is -inf",
        ),
        ({"operators": [OperatorUse("golden", blend=1.5)]}, InvalidRequestError, "operators[0].blend", "blend: is 1.5"),
        (
            {"operators": [OperatorUse("golden", 1e-8)]},
            InvalidRequestError,
            "operators[0].strength",
            "lost in rounding",
        ),
        (
            {"operators": [OperatorUse("golden", 0.5), OperatorUse("golden", -0.5, positions=Positions("generated"))]},
            InvalidRequestError,
            "operators[1].strength",
            "cancels",
        ),
        (
            {"operators": [OperatorUse("golden", blend=-0.1)]},
            InvalidRequestError,
            "operators[0].blend",
            "blend: is -0.1",
        ),
        (
            {"operators": [OperatorUse("golden", blend=math.nan)]},
            InvalidRequestError,
            "operators[0].blend",
            "blend: is nan",
        ),
        (
            {"operators": [OperatorUse("golden", positions=Positions("generated", 3))]},
            InvalidRequestError,
            "operators[0].positions",
            "begins at position",
        ),
        (
            {"operators": [OperatorUse("golden", positions=Positions(start=-1))]},
            InvalidRequestError,
            "operators[0].positions.start",
            "is -1",
        ),
        (
            {"operators": [OperatorUse("golden", positions=Positions("prompt", 4, 2))]},
            InvalidRequestError,
            "operators[0].positions.end",
            "is 2; a number above the start 4",
        ),
        ({"sampling": SamplingParams(max_tokens=-5)}, InvalidRequestError, "sampling.max_tokens", "-5"),
        ({"sampling": SamplingParams(max_tokens=0)}, InvalidRequestError, "sampling.max_tokens", "0"),
        ({"sampling": SamplingParams(temperature=math.nan)}, InvalidRequestError, "sampling.temperature", "nan"),
        ({"sampling": SamplingParams(temperature=-1)}, InvalidRequestError, "sampling.temperature", "-1"),
        ({"sampling": SamplingParams(top_p=0)}, InvalidRequestError, "sampling.top_p", "0"),
        ({"sampling": SamplingParams(logprobs=21)}, InvalidRequestError, "sampling.logprobs", "21"),
        (
            {"sampling": SamplingParams(presence_penalty=math.nan)},
            InvalidRequestError,
            "sampling.presence_penalty",
            "nan",
        ),
        ({"sampling": SamplingParams(frequency_penalty=3)}, InvalidRequestError, "sampling.frequency_penalty", "3"),
        (
            {"sampling": SamplingParams(logit_bias={2**30: 1})},
            InvalidRequestError,
            "sampling.logit_bias[0].token_id",
            str(2**30),
        ),
        (
            {"sampling": SamplingParams(max_tokens=4, min_tokens=5)},
            InvalidRequestError,
            "sampling.min_tokens",
            "0 to 4",
        ),
        ({"sampling": SamplingParams(time_limit=0)}, InvalidRequestError, "sampling.time_limit", "0"),
        ({"sampling": SamplingParams(stop_token_ids=[9, -2])}, InvalidRequestError, "sampling.stop_token_ids[1]", "-2"),
        ({"request_id": "x" * 129}, InvalidRequestError, "request_id", "129"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_value_that_is_not_accepted_is_refused_by_name(client, arguments, kind, field, words):
    call = {"prompt": "the bay", "sampling": SHORT} | arguments
    prompt = call.pop("prompt")
    for run in (client.generate, lambda *a, **k: list(client.stream(*a, **k))):
        with pytest.raises(InvalidRequestError) as caught:
            run(prompt, **call)
        assert type(caught.value) is kind
        assert caught.value.field == field
        assert words in str(caught.value)


def test_a_prompt_that_just_fits_leaves_room_for_one_token(client):
    result = client.generate([5] * 4095, sampling=SamplingParams(max_tokens=10, ignore_eos=True))
    assert result.finish_reason in (FinishReason.CONTEXT_LIMIT, FinishReason.MAX_TOKENS)
    assert result.usage.completion_tokens == 1
    assert result.finish_reason is FinishReason.CONTEXT_LIMIT


def test_a_chat_is_rendered_and_an_odd_role_harms_nobody(client):
    result = client.generate(Chat((ChatMessage("user", "hello"),)), sampling=SHORT)
    assert result.usage.prompt_tokens > 0
    client.generate(Chat((ChatMessage("nobody", ""),)), sampling=SHORT)


@pytest.mark.parametrize("temperature", [1e-40, 1e300])
def test_an_extreme_temperature_is_served(client, temperature):
    result = client.generate("the bay", sampling=replace(SHORT, temperature=temperature))
    assert result.usage.completion_tokens == 4


@pytest.mark.parametrize(
    "name", ["no-such-thing", "../golden", "/etc/passwd", "golden.safetensors", "", "GOLDEN", "日"]
)
def test_an_unknown_operator_is_named_and_the_known_ones_are_listed(client, name):
    for call in (
        lambda: client.generate("x", operators=[OperatorUse(name)]),
        lambda: client.compare("x", operators=[OperatorUse("golden"), OperatorUse(name)]),
        lambda: client.operator(name),
    ):
        with pytest.raises(UnknownOperatorError) as caught:
            call()
        assert repr(name) in str(caught.value)
        assert "golden" in str(caught.value)


def test_a_rule_of_a_later_contract_is_refused_by_its_number(server):
    with grpc.insecure_channel(server.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        use = sp.OperatorUse(name="golden", rule=9)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(pb.GenerateRequest(prompt=text_pb2.Prompt(text="x"), operators=[use]), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "is 9" in caught.value.details()
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in rpc_status.from_call(caught.value).details)
    assert bad.field_violations[0].field == "operators[0].rule"


@pytest.mark.parametrize(
    ("arms", "field"),
    [
        ({"normal": GOLDEN}, "arms[0].name"),
        ({"": GOLDEN}, "arms[0].name"),
        ({"a": GOLDEN, "b": []}, "arms[1].operators"),
        ({f"arm-{place}": GOLDEN for place in range(17)}, "arms"),
    ],
    ids=["normal", "nameless", "plain", "too many"],
)
def test_arms_that_make_no_comparison_are_refused_by_name(client, arms, field):
    with pytest.raises(InvalidRequestError) as caught:
        client.compare("x", arms=arms, sampling=SHORT)
    assert caught.value.field == field


def test_without_the_plain_arm_at_least_one_other_is_needed(client):
    with pytest.raises(InvalidRequestError, match="at least one is needed") as caught:
        client.compare("x", arms={}, normal=False, sampling=SHORT)
    assert caught.value.field == "arms"
    assert client.compare("x", arms={}, sampling=SHORT).steered == {}


def test_bytes_that_are_no_message_are_refused(server):
    with grpc.insecure_channel(server.target) as channel:
        call = channel.unary_unary("/steering.v1.GenerationService/Generate")
        for garbage in (b"\xff" * 40, b"\x0a\x05ab", bytes(range(256))):
            with pytest.raises(grpc.RpcError) as caught:
                call(garbage, timeout=10)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "GenerateRequest" in caught.value.details()


def test_malformed_bytes_are_refused_by_every_method_of_every_service(server):
    services = [
        module.DESCRIPTOR.services_by_name.values() for module in (pb, operators_pb2, health_pb2, reflection_pb2)
    ]
    lines = len(server.log)
    with grpc.insecure_channel(server.target) as channel:
        for method in (method for each in services for service in each for method in service.methods):
            path = f"/{method.containing_service.full_name}/{method.name}"
            for garbage in (b"\xff" * 40, b"\x0a\x05ab"):
                # On the wire, one message is a stream of one.
                with pytest.raises(grpc.RpcError) as caught:
                    list(channel.stream_stream(path)(iter([garbage]), timeout=10))
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, path
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/grpc.health.v1.Health/List")(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "Traceback" not in "\n".join(server.log[lines:])


def test_a_method_that_does_not_exist_is_unimplemented(server):
    with grpc.insecure_channel(server.target) as channel:
        for path in ("/steering.v1.GenerationService/Guess", "/nothing.at.All/Here"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(b"", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_bytes_that_are_no_http2_harm_nobody(server):
    host, _, port = server.target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n\x00\xff" * 50)


def test_a_message_over_the_limit_is_refused_and_is_no_busy_server(client):
    with pytest.raises(ServerError, match="larger than max") as caught:
        client.generate("x" * (17 << 20))
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_huge_prompts_are_refused_and_hold_up_nobody(server, client):
    huge = "the bridge over the bay " * 75_000
    assert len(huge) == 1_800_000
    start, served = threading.Barrier(9), threading.Event()

    def send():
        refused = 0
        with SteerClient(server.target, timeout=60) as other:
            start.wait(30)
            while not (refused and served.is_set()):
                with pytest.raises(PromptTooLongError):
                    other.generate(huge)
                refused += 1
        return refused

    with ThreadPoolExecutor(8) as pool:
        senders = [pool.submit(send) for _ in range(8)]
        start.wait(30)
        waits = []
        try:
            for _ in range(5):
                began = time.monotonic()
                result = client.generate("the golden gate", operators=GOLDEN, sampling=SHORT)
                waits.append(time.monotonic() - began)
                assert result.usage.completion_tokens == 4
        finally:
            served.set()
    assert all(sender.result() > 0 for sender in senders)
    assert max(waits) < 5


def test_more_than_is_accepted_is_refused_by_name(client):
    for arguments, field in (
        ({"operators": GOLDEN * 17}, "operators"),
        ({"sampling": replace(SHORT, stop_strings=["x"] * 65)}, "sampling.stop_strings"),
        ({"sampling": replace(SHORT, stop_strings=["x" * 1025])}, "sampling.stop_strings"),
        ({"sampling": replace(SHORT, stop_token_ids=[1] * 65)}, "sampling.stop_token_ids"),
        ({"sampling": replace(SHORT, logit_bias=dict.fromkeys(range(301), 1.0))}, "sampling.logit_bias"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            client.generate("x", **{"sampling": SHORT} | arguments)
        assert caught.value.field == field
    with pytest.raises(InvalidRequestError) as caught:
        client.compare("x", arms={"a": GOLDEN, "b": GOLDEN * 17}, sampling=SHORT)
    assert caught.value.field == "arms[1].operators"


def test_doses_that_add_up_to_more_than_is_accepted_are_refused_by_name(client):
    together = [OperatorUse("golden", 1.8), OperatorUse("golden", -0.9), OperatorUse("dress", 2.0)]
    for call, field in (
        (lambda: client.generate("x", operators=together, sampling=SHORT), "operators"),
        (lambda: client.compare("x", arms={"a": GOLDEN, "b": together}, sampling=SHORT), "arms[1].operators"),
        (lambda: client.generate("x", operators=[OperatorUse("dress", 2.7)], sampling=SHORT), "operators[0].strength"),
    ):
        with pytest.raises(DoseTooHighError, match=r"add up to 2\.7; at most 2 is accepted") as caught:
            call()
        assert caught.value.field == field
        assert caught.value.metadata["dose"] == "1.35"


def test_many_prompts_at_once_are_each_read_as_if_alone(server, loaded):
    texts = [f"the bay {number} " * (number + 1) for number in range(24)]

    def ask(text):
        with SteerClient(server.target, timeout=30) as client:
            return list(client.tokenize(text).token_ids)

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(ask, texts * 4))
    assert found == [loaded.tokenizer(text)["input_ids"] for text in texts] * 4
