import os
import subprocess
import sys
import textwrap

import grpc
import pytest
import steer_client
from grpc_health.v1 import health_pb2
from steer_client import (
    Arm,
    AsyncSteerClient,
    ChatMessage,
    FinishReason,
    InvalidRequestError,
    OperatorUse,
    SamplingParams,
    SteerClient,
    UnknownOperatorError,
)
from steering.v1 import generation_pb2 as pb
from steering.v1 import operators_pb2 as ops
from steering.v1 import steering_pb2 as sp
from steering.v1 import text_pb2


def test_a_request_arrives_as_it_was_asked(fake, make, generate):
    sent = [
        sp.OperatorUse(name="golden-gate", strength=0.4, rule=sp.RULE_SUBSTITUTE, blend=0.5),
        sp.OperatorUse(name="baseball"),
    ]
    fake.response = make.response(operators=sent)
    result = generate(
        fake.target,
        [ChatMessage("user", "hi")],
        operators=[OperatorUse("golden-gate", 0.4, "substitute", 0.5), OperatorUse("baseball")],
        sampling=SamplingParams(max_tokens=8, seed=0),
        request_id="mine",
    )
    assert fake.requests == [
        pb.GenerateRequest(
            request_id="mine",
            prompt=text_pb2.Prompt(chat=text_pb2.Chat(messages=[text_pb2.ChatMessage(role="user", content="hi")])),
            sampling=text_pb2.SamplingParams(max_tokens=8, seed=0),
            operators=sent,
        )
    ]
    assert result.text == "one two"
    assert result.finish_reason is FinishReason.MAX_TOKENS
    assert result.stop_string is None
    assert result.timings.total == 1.5


def test_operators_may_come_from_an_iterator(fake, make, generate):
    fake.response = make.response(operators=("a", "b"))
    assert len(generate(fake.target, operators=(OperatorUse(name) for name in "ab")).receipts) == 2


def test_a_comparison_arrives_as_it_was_asked(fake, compare):
    compare(fake.target, operators=[OperatorUse("golden-gate")], score=False)
    compare(fake.target, arms={"a": [OperatorUse("x")], "b": [OperatorUse("x", 0.0)]})
    first, second = fake.requests
    assert [arm.name for arm in first.arms] == ["steered"]
    assert (first.HasField("score"), first.score) == (True, False)
    assert [arm.name for arm in second.arms] == ["a", "b"]
    assert second.arms[1].operators[0].HasField("strength")
    assert second.score


@pytest.mark.parametrize(
    "operators",
    [
        {"golden-gate": 0.4, "tea": None},
        ["golden-gate=0.4", OperatorUse("tea")],
        (text for text in ("golden-gate=0.4", "tea")),
    ],
    ids=["mapping", "list", "iterator"],
)
def test_operators_may_be_written_as_on_the_command_line(client, fake, operators):
    arms = {
        "both": operators,
        "one": "tea=0.2@0.5,anchor=concept",
        "own": Arm("tea", SamplingParams(top_k=3)),
        "plain": Arm(),
    }
    result = client.compare("hello", arms=arms)
    (sent,) = fake.requests
    assert [[(use.name, use.strength) for use in arm.operators] for arm in sent.arms] == [
        [("golden-gate", 0.4), ("tea", 0.0)],
        [("tea", 0.2)],
        [("tea", 0.0)],
        [],
    ]
    first, second, third, fourth = sent.arms
    assert not first.operators[1].HasField("strength")
    assert (second.operators[0].blend, second.operators[0].anchor) == (0.5, sp.ANCHOR_CONCEPT)
    assert [arm.HasField("sampling") for arm in sent.arms] == [False, False, True, False]
    assert third.sampling == text_pb2.SamplingParams(top_k=3)
    assert list(result.steered) == list(arms)
    assert not fourth.operators


@pytest.mark.parametrize(
    ("operators", "field"), [("tea=much", "operators"), (["tea", "="], "operators[1]"), ({"tea": "x"}, "operators[0]")]
)
def test_operators_that_cannot_be_read_are_named(client, fake, operators, field):
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("hello", operators=operators)
    assert caught.value.field.removesuffix(".strength") == field
    assert fake.requests == []


def test_of_several_samples_each_is_a_result_of_its_own(fake, compare):
    result = compare(fake.target, operators="golden-gate", n=3)
    (sent,) = fake.requests
    assert (sent.n, sent.HasField("normal")) == (3, False)
    assert [each.normal.seed for each in result.samples] == [7, 8, 9]
    assert [each.steered["steered"].generation.sample for each in result.samples] == [0, 1, 2]
    assert (result.normal.sample, result.samples[0].normal) == (0, result.normal)
    assert all(each.samples == (each,) for each in result.samples)


def test_without_the_plain_arm_there_is_no_normal_text(fake, compare):
    result = compare(fake.target, arms={"a": "golden-gate"}, normal=False)
    (sent,) = fake.requests
    assert (sent.HasField("normal"), sent.normal) == (True, False)
    assert result.plain is None
    assert result.steered["a"].generation.text == "one more"
    with pytest.raises(RuntimeError, match="normal=False"):
        _ = result.normal


def test_operators_and_arms_together_are_refused(fake, compare):
    with pytest.raises(InvalidRequestError, match="not both"):
        compare(fake.target, operators=[OperatorUse("x")], arms={"a": [OperatorUse("x")]})
    assert fake.requests == []


def test_a_comparison_of_nothing_says_what_it_needs(fake, compare):
    for nothing in ((), iter(())):
        with pytest.raises(InvalidRequestError, match="at least one OperatorUse, or `arms`") as caught:
            compare(fake.target, operators=nothing)
        assert caught.value.field == "operators"
    assert fake.requests == []


def test_operators_to_compare_may_come_from_an_iterator(fake, compare):
    compare(fake.target, operators=(OperatorUse(name) for name in "ab"))
    assert [use.name for use in fake.requests[0].arms[0].operators] == ["a", "b"]


@pytest.mark.parametrize("target", ["localhost", "127.0.0.1:", ":50051", "a b:1", "::1", "::1:50051", "http://a:1"])
def test_a_target_without_host_or_port_is_refused_by_name(target, monkeypatch):
    monkeypatch.setenv("STEER_TARGET", target)
    for make in (SteerClient, AsyncSteerClient, lambda: SteerClient(target)):
        with pytest.raises(InvalidRequestError, match="is not HOST:PORT") as caught:
            make()
        assert (caught.value.field, repr(target) in str(caught.value)) == ("target", True)


@pytest.mark.parametrize("target", ["a-host.example:1", "[::1]:50051", "unix:/tmp/socket", "dns:///steer.example"])
def test_a_target_that_grpc_can_find_is_taken(target):
    with SteerClient(target) as client:
        assert client.target == target


def test_what_cannot_be_sent_is_refused_before_it_is_sent(fake, any_call):
    with pytest.raises(InvalidRequestError) as caught:
        any_call(fake.target, [2**31])
    assert caught.value.field == "prompt.token_ids[0]"
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert fake.requests == []


async def test_both_clients_give_the_same_answers(client, async_client, fake, make):
    fake.listed = ops.ListOperatorsResponse(
        operators=[ops.Operator(name="a", recommended_rule=1), ops.Operator(name="b", problem="bad digest")]
    )
    assert client.operators() == await async_client.operators()
    assert [info.usable for info in client.operators()] == [True, False]
    assert client.operator("a") == await async_client.operator("a")
    assert client.reload_operators() == await async_client.reload_operators()
    assert client.model_info() == await async_client.model_info()
    assert client.tokenize("a b") == await async_client.tokenize("a b")
    assert client.generate("hello") == await async_client.generate("hello")
    assert client.health() is await async_client.health() is True
    assert client.tokenize("a b").tokens == ("a", " b")
    assert client.reload_operators().unusable == ("broken",)


async def test_health_follows_the_server(client, async_client, fake):
    fake.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert client.health() is False
    assert await async_client.health() is False


def test_an_unknown_operator_is_an_error_of_its_own(client, fake, make):
    fake.fault = make.fault(grpc.StatusCode.NOT_FOUND, "no operator 'x'", "UNKNOWN_OPERATOR")
    with pytest.raises(UnknownOperatorError, match="no operator 'x'"):
        client.operator("x")


def test_the_target_is_the_argument_then_the_environment_then_this_machine(monkeypatch):
    monkeypatch.delenv("STEER_TARGET", raising=False)
    for kind in (SteerClient, AsyncSteerClient):
        assert kind().target == "127.0.0.1:50051"
    monkeypatch.setenv("STEER_TARGET", "example:1")
    for kind in (SteerClient, AsyncSteerClient):
        assert kind().target == "example:1"
        assert kind("other:2").target == "other:2"


@pytest.mark.parametrize("timeout", ["soon", float("nan"), True])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(client, timeout):
    with pytest.raises(InvalidRequestError, match="timeout"):
        client.generate("hello", timeout=timeout)


def test_no_timeout_is_no_deadline(client):
    assert client.generate("hello", timeout=None).text == "one two"
    assert client.generate("hello", timeout=float("inf")).text == "one two"


async def test_an_async_client_that_was_never_used_closes():
    async with AsyncSteerClient("127.0.0.1:1"):
        pass


def test_the_example_of_the_package_runs(fake, monkeypatch, capsys):
    monkeypatch.setenv("STEER_TARGET", fake.target)
    lines = steer_client.__doc__.splitlines()
    example = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))
    exec(compile(example, "example", "exec"), {})
    assert capsys.readouterr().out == "one two\none more\n"


def test_every_public_name_exists_once():
    assert len(set(steer_client.__all__)) == len(steer_client.__all__)
    assert all(hasattr(steer_client, name) for name in steer_client.__all__)


def test_the_client_needs_neither_torch_nor_the_server():
    heavy = "torch", "numpy", "pydantic", "operators", "steer_server"
    shown = f"[name for name in {heavy!r} if name in sys.modules]"
    program = f"import steer_client._cli.app, sys; steer_client.SteerClient; print({shown})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
