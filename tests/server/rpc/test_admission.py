"""Limits of every field of every request that the server takes, and the errors that more of it meets."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from steering.v1 import comparison_pb2, score_pb2, text_pb2
from steering.v1 import generation_pb2 as pb
from steering.v1 import operators_pb2 as ops
from steering.v1 import steering_pb2 as sp

from steer_server import types
from steer_server.errors import InvalidRequestError, PromptTooLongError
from steer_server.rpc.admission import Admission
from steer_server.rpc.request_limits import field_limits
from steer_server.rpc.server import SERVICES
from steer_server.types.limits import Bounded

STANDARD = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
GENERATE, COMPARE = "/steering.v1.GenerationService/Generate", "/steering.v1.GenerationService/Compare"
TOKENIZE, SCORE = "/steering.v1.GenerationService/Tokenize", "/steering.v1.GenerationService/Score"
MAX_PROMPT = 2000


@pytest.fixture
def admission(model_info):
    # A method with a list or a text that has no limit cannot be made.
    pool = descriptor_pool.Default()
    return Admission(pool, (*SERVICES, *STANDARD), model_info, max_prompt_bytes=MAX_PROMPT, max_arms=3)


def read(admission, method, message):
    return admission.read(method, message.SerializeToString(), type(message).FromString)


def request(**fields):
    return pb.GenerateRequest(**{"prompt": text_pb2.Prompt(text="x"), **fields})


def test_every_limit_is_of_a_field_that_exists(model_info):
    pool = descriptor_pool.Default()
    limits = field_limits(model_info, max_prompt_bytes=1, max_arms=1)
    for name, limit in limits.items():
        field = pool.FindFieldByName(name)
        assert (limit.count is not None) == field.is_repeated
        if field.type in (field.TYPE_STRING, field.TYPE_BYTES):
            assert limit.size is not None


def test_what_a_dataclass_accepts_is_let_through_to_it(model_info):
    limits = field_limits(model_info, max_prompt_bytes=1, max_arms=1)
    for message, cls in (
        ("GenerateRequest", types.GenerationRequest),
        ("CompareRequest", types.CompareRequest),
        ("ScoreRequest", types.ScoreRequest),
        ("TokenReport", types.TokenReport),
        ("SamplingParams", types.SamplingParams),
        ("Arm", types.Arm),
        ("NamedPrompt", types.NamedPrompt),
        ("OperatorUse", types.OperatorUse),
        ("WeightedWord", types.WeightedWord),
    ):
        for name, hint in get_type_hints(cls, include_extras=True).items():
            for bound in getattr(hint, "__metadata__", ()):
                if isinstance(bound, Bounded):
                    limit = limits[f"steering.v1.{message}.{name}"]
                    assert limit.count == bound.max_items
                    assert limit.size == (None if bound.max_characters is None else 4 * bound.max_characters)


@pytest.mark.parametrize(
    ("method", "message", "field"),
    [
        (GENERATE, request(request_id="x" * 10**6), "request_id"),
        (GENERATE, request(operators=[sp.OperatorUse()] * 10**5), "operators"),
        (GENERATE, request(operators=[sp.OperatorUse(name="x" * 10**6)]), "operators[0].name"),
        (
            GENERATE,
            request(operators=[sp.OperatorUse(words=[sp.WeightedWord()] * 10**5)]),
            "operators[0].words",
        ),
        (GENERATE, request(sampling=text_pb2.SamplingParams(stop_strings=["x"] * 10**5)), "sampling.stop_strings"),
        (GENERATE, request(sampling=text_pb2.SamplingParams(stop_strings=["x" * 10**6])), "sampling.stop_strings[0]"),
        (GENERATE, request(sampling=text_pb2.SamplingParams(stop_token_ids=[1] * 10**5)), "sampling.stop_token_ids"),
        (
            GENERATE,
            request(prompt=text_pb2.Prompt(chat=text_pb2.Chat(messages=[text_pb2.ChatMessage()] * 1025))),
            "prompt.chat.messages",
        ),
        (
            GENERATE,
            request(prompt=text_pb2.Prompt(chat=text_pb2.Chat(messages=[text_pb2.ChatMessage(role="x" * 300)]))),
            "prompt.chat.messages[0].role",
        ),
        (COMPARE, comparison_pb2.CompareRequest(arms=[comparison_pb2.Arm()] * 10**5), "arms"),
        (COMPARE, comparison_pb2.CompareRequest(arms=[comparison_pb2.Arm(name="x" * 10**6)]), "arms[0].name"),
        (
            COMPARE,
            comparison_pb2.CompareRequest(arms=[comparison_pb2.Arm(operators=[sp.OperatorUse()] * 10**5)]),
            "arms[0].operators",
        ),
        (
            COMPARE,
            comparison_pb2.CompareRequest(prompts=[comparison_pb2.NamedPrompt()] * 257),
            "prompts",
        ),
        (
            COMPARE,
            comparison_pb2.CompareRequest(prompts=[comparison_pb2.NamedPrompt(id="x" * 1000)]),
            "prompts[0].id",
        ),
        (SCORE, score_pb2.ScoreRequest(request_id="x" * 10**6), "request_id"),
        (SCORE, score_pb2.ScoreRequest(text="x" * (MAX_PROMPT + 1)), "text"),
        (SCORE, score_pb2.ScoreRequest(token_ids=text_pb2.TokenIds(ids=[5] * 65)), "token_ids"),
        (SCORE, score_pb2.ScoreRequest(arms=[comparison_pb2.Arm()] * 10**5), "arms"),
        (SCORE, score_pb2.ScoreRequest(report=comparison_pb2.TokenReport(words=["a"] * 33)), "report.words"),
        (COMPARE, comparison_pb2.CompareRequest(report={"words": ["x" * 10**6]}), "report.words[0]"),
        ("/steering.v1.OperatorService/GetOperator", ops.GetOperatorRequest(name="x" * 10**6), "name"),
        ("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service="x" * 10**6), "request"),
        (
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest(file_by_filename="x" * 1100),
            "file_by_filename",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "[" in value else "",
)
def test_too_much_of_a_field_is_refused_by_its_name(admission, method, message, field):
    with pytest.raises(InvalidRequestError, match=r"at most \d+ are accepted") as caught:
        read(admission, method, message)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (text_pb2.Prompt(text="x" * (MAX_PROMPT + 1)), "2001 bytes"),
        (text_pb2.Prompt(token_ids=text_pb2.TokenIds(ids=[5] * 65)), "65 tokens"),
        (text_pb2.Prompt(chat=text_pb2.Chat(messages=[text_pb2.ChatMessage(content="x" * 2001)])), "2001 bytes"),
        (text_pb2.Prompt(chat=text_pb2.Chat(messages=[text_pb2.ChatMessage(content="x" * 1999)] * 1000)), "bytes"),
    ],
    ids=["text", "ids", "content", "conversation"],
)
def test_more_than_could_fit_into_the_context_is_a_prompt_that_is_too_long(admission, prompt, found):
    with pytest.raises(PromptTooLongError, match=rf"{found}; this model takes at most 63 tokens") as caught:
        read(admission, TOKENIZE, pb.TokenizeRequest(prompt=prompt))
    assert caught.value.field == "prompt"


def _several(*prompts):
    named = [comparison_pb2.NamedPrompt(id=str(index), prompt=prompt) for index, prompt in enumerate(prompts)]
    return comparison_pb2.CompareRequest(prompts=named)


def test_of_several_prompts_the_one_that_is_too_long_is_named(admission):
    fine, long = text_pb2.Prompt(text="x"), text_pb2.Prompt(token_ids=text_pb2.TokenIds(ids=[5] * 65))
    with pytest.raises(PromptTooLongError, match=r"^prompts\[1\]\.prompt: has 65 tokens") as caught:
        read(admission, COMPARE, _several(fine, long, fine))
    assert caught.value.field == "prompts[1].prompt"


def test_several_prompts_are_bounded_together(model_info):
    pool, longest = descriptor_pool.Default(), 1 << 20
    admission = Admission(pool, (*SERVICES, *STANDARD), model_info, max_prompt_bytes=longest, max_arms=3)
    assert admission.limits.max_request_bytes < 6 * longest
    prompt = text_pb2.Prompt(text="x" * (longest - 100))
    assert len(read(admission, COMPARE, _several(*[prompt] * 2)).prompts) == 2
    with pytest.raises(InvalidRequestError, match=r"^prompts: have \d+ bytes together or more; at most 2097152 are"):
        read(admission, COMPARE, _several(*[prompt] * 3))


def test_prompts_in_place_of_one_make_no_request_larger_than_the_longest_prompt_does(model_info):
    pool, longest = descriptor_pool.Default(), 16 << 20
    admission = Admission(pool, (*SERVICES, *STANDARD), model_info, max_prompt_bytes=longest, max_arms=16)
    assert longest < admission._measures[COMPARE].max_bytes < longest + (4 << 20)
    read(admission, COMPARE, _several(text_pb2.Prompt(text="x" * longest)))


def test_arms_are_bounded_together(model_info):
    admission = Admission(
        descriptor_pool.Default(), (*SERVICES, *STANDARD), model_info, max_prompt_bytes=MAX_PROMPT, max_arms=16
    )
    stops = text_pb2.SamplingParams(stop_strings=["x" * 4096] * 64)
    arms = [comparison_pb2.Arm(name=str(place), sampling=stops) for place in range(17)]
    with pytest.raises(InvalidRequestError, match=r"^arms: have \d+ bytes together or more; at most 2097152 are"):
        read(admission, COMPARE, comparison_pb2.CompareRequest(arms=arms))


def test_a_text_that_is_no_text_is_refused(admission):
    data = request(request_id="abc").SerializeToString().replace(b"abc", b"a\xffc")
    with pytest.raises(InvalidRequestError, match="UTF-8"):
        admission.read(GENERATE, data, pb.GenerateRequest.FromString)


def test_a_field_of_a_later_contract_is_refused_and_not_left_out(admission):
    use = sp.OperatorUse(name="golden").SerializeToString() + bytes((99 << 3 & 0x7F | 0x80, 99 >> 4, 1))
    data = request().SerializeToString() + bytes((0x22, len(use))) + use
    with pytest.raises(InvalidRequestError, match="number 99, which OperatorUse does not have") as caught:
        admission.read(GENERATE, data, pb.GenerateRequest.FromString)
    assert caught.value.field == "operators[0]"


def test_a_later_health_check_is_understood(admission):
    data = health_pb2.HealthCheckRequest(service="x").SerializeToString() + b"\x7a\x01a"
    assert admission.read("/grpc.health.v1.Health/Check", data, health_pb2.HealthCheckRequest.FromString).service == "x"


def test_what_is_accepted_is_told(admission):
    limits = admission.limits
    assert (limits.max_prompt_bytes, limits.max_operators, limits.max_words) == (MAX_PROMPT, 16, 16)
    assert limits.max_request_bytes < 8 << 20
    assert admission.max_received_bytes >= max(limits.max_request_bytes, 4 << 20)


def test_the_contract_says_how_long_a_name_may_be():
    folder = Path(__file__).parents[3] / "protos/steering/v1"
    source = "".join((folder / name).read_text(encoding="utf-8") for name in ("generation.proto", "comparison.proto"))
    documented = [int(number) for number in re.findall(r"at most (\d+) characters", source, re.IGNORECASE)]
    assert documented == [types.MAX_REQUEST_ID, types.MAX_ARM_NAME, types.MAX_PROMPT_ID]
