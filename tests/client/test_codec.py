from dataclasses import asdict, astuple, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from steer_client import (
    ALL_POSITIONS,
    KL,
    Chat,
    ChatMessage,
    FinishReason,
    Generation,
    InvalidRequestError,
    OperatorUse,
    Positions,
    ProtocolError,
    SamplingParams,
    TextDelta,
)
from steer_client import _decode as decode
from steer_client import _encode as encode
from steering.v1 import comparison_pb2, text_pb2
from steering.v1 import generation_pb2 as pb
from steering.v1 import operators_pb2 as ops
from steering.v1 import steering_pb2 as sp

INT32 = st.integers(-(2**31), 2**31 - 1)
NUMBERS = st.floats(allow_nan=False)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)


def maybe(values):
    return st.none() | values


@settings(max_examples=40)
@given(
    st.builds(
        OperatorUse,
        name=TEXTS,
        strength=maybe(NUMBERS),
        rule=st.sampled_from([None, "cumulative", "substitute"]),
        blend=maybe(NUMBERS),
        positions=maybe(
            st.builds(Positions, st.sampled_from(["all", "prompt", "generated"]), start=INT32, end=maybe(INT32))
        ),
    )
)
def test_an_operators_value_is_on_the_wire_exactly_when_it_is_set(use):
    sent = sp.OperatorUse.FromString(request(operators=[use]).operators[0].SerializeToString())
    assert sent.name == use.name
    assert (sent.strength if sent.HasField("strength") else None) == use.strength
    assert (sent.blend if sent.HasField("blend") else None) == use.blend
    names = {None: "RULE_UNSPECIFIED", "cumulative": "RULE_CUMULATIVE", "substitute": "RULE_SUBSTITUTE"}
    assert sp.Rule.Name(sent.rule) == names[use.rule]
    assert sent.HasField("positions") == (use.positions is not None)
    if use.positions is not None:
        part, end = sp.Positions.Part.Name(sent.positions.part), sent.positions.end
        found = (
            part.removeprefix("PART_").lower(),
            sent.positions.start,
            end if sent.positions.HasField("end") else None,
        )
        assert found == astuple(use.positions)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("", "text"),
        ("hello", "text"),
        ([1, 2], "token_ids"),
        ((), "token_ids"),
        (range(3), "token_ids"),
        (Chat([ChatMessage("user", "hi")]), "chat"),
        (Chat([]), "chat"),
        ([ChatMessage("system", "be brief"), ChatMessage("user", "hi")], "chat"),
    ],
)
def test_a_prompt_is_sent_as_what_it_is(prompt, kind):
    message = encode.tokenize_request(prompt).prompt
    assert message.WhichOneof("input") == kind
    if kind == "text":
        assert message.text == prompt
    elif kind == "token_ids":
        assert list(message.token_ids.ids) == list(prompt)
    else:
        turns = prompt.messages if isinstance(prompt, Chat) else prompt
        assert [(turn.role, turn.content) for turn in message.chat.messages] == [
            (turn.role, turn.content) for turn in turns
        ]


def request(prompt="hi", operators=(), request_id="", **sampling):
    return encode.generate_request(prompt, operators, SamplingParams(**sampling), request_id)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": b"bytes"}),
        ("prompt.text", {"prompt": "\ud800"}),
        ("prompt.token_ids[1]", {"prompt": [1, 2**31]}),
        ("prompt.token_ids[0]", {"prompt": [True]}),
        ("prompt.token_ids[0]", {"prompt": ["1"]}),
        ("prompt.chat.messages[0].content", {"prompt": [ChatMessage("user", 3)]}),
        ("prompt.chat.messages[1]", {"prompt": [ChatMessage("user", "hi"), "and"]}),
        ("request_id", {"request_id": 5}),
        ("operators[0]", {"operators": ["golden-gate"]}),
        ("operators[1].strength", {"operators": [OperatorUse("a"), OperatorUse("b", strength="0.4")]}),
        ("operators[0].blend", {"operators": [OperatorUse("a", blend=True)]}),
        ("operators[0].rule", {"operators": [OperatorUse("a", rule="other")]}),
        ("operators[0].rule", {"operators": [OperatorUse("a", rule=["cumulative"])]}),
        ("operators[0].name", {"operators": [OperatorUse(None)]}),
        ("operators[0].positions", {"operators": [OperatorUse("a", positions="first")]}),
        ("operators[0].positions.part", {"operators": [OperatorUse("a", positions=Positions("last"))]}),
        ("operators[0].positions.start", {"operators": [OperatorUse("a", positions=Positions(start=2**31))]}),
        ("operators[0].positions.end", {"operators": [OperatorUse("a", positions=Positions(end=1.5))]}),
        ("sampling.seed", {"seed": -1}),
        ("sampling.seed", {"seed": 2**64}),
        ("sampling.top_k", {"top_k": 2.5}),
        ("sampling.max_tokens", {"max_tokens": 2**31}),
        ("sampling.temperature", {"temperature": "hot"}),
        ("sampling.temperature", {"temperature": 10**400}),
        ("sampling.ignore_eos", {"ignore_eos": 1}),
        ("sampling.stop_strings", {"stop_strings": "stop"}),
        ("sampling.stop_strings[0]", {"stop_strings": [1]}),
        ("sampling.stop_token_ids[0]", {"stop_token_ids": [2**40]}),
        ("sampling.logit_bias", {"logit_bias": 5}),
        ("sampling.logit_bias", {"logit_bias": "5=1"}),
        ("sampling.logit_bias[0]", {"logit_bias": [(5, 1.0)]}),
        ("sampling.logit_bias[1].token_id", {"logit_bias": {5: 1.0, "6": 1.0}}),
        ("sampling.logit_bias[0].bias", {"logit_bias": {5: "1"}}),
        ("sampling.time_limit", {"time_limit": float("nan")}),
        ("sampling.time_limit", {"time_limit": float("inf")}),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_by_the_name_of_its_field(field, arguments):
    with pytest.raises(InvalidRequestError) as caught:
        request(**arguments)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


def test_the_servers_ranges_are_not_judged_here():
    request(temperature=-1, top_p=7, top_k=-3, max_tokens=0, logprobs=99, time_limit=-1)


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("golden-gate", OperatorUse("golden-gate")),
        ("golden-gate=0.4", OperatorUse("golden-gate", strength=0.4)),
        ("golden-gate=-0.5", OperatorUse("golden-gate", strength=-0.5)),
        ("golden-gate=0", OperatorUse("golden-gate", strength=0.0)),
        ("golden-gate=0.4@0.5", OperatorUse("golden-gate", strength=0.4, blend=0.5)),
        ("golden-gate=1e-3@0", OperatorUse("golden-gate", strength=0.001, blend=0.0)),
        ("golden-gate:first", OperatorUse("golden-gate", positions=Positions(end=1))),
        ("golden-gate=0.4:all", OperatorUse("golden-gate", 0.4, positions=ALL_POSITIONS)),
        ("golden-gate=0.4@0.5:generated", OperatorUse("golden-gate", 0.4, None, 0.5, Positions("generated"))),
        ("golden-gate=-1:generated:2..5", OperatorUse("golden-gate", -1.0, positions=Positions("generated", 2, 5))),
    ],
)
def test_an_operator_is_read_from_its_short_form(text, use):
    assert OperatorUse.parse(text) == use


@pytest.mark.parametrize(
    "text", ["", "=0.4", "a=", "a=x", "a=0.4@", "a=0.4@x", "a@0.5", "a=1=2", " a", "a=1@2@3", ":first"]
)
def test_any_other_form_is_refused_with_the_accepted_one(text):
    with pytest.raises(ValueError, match="NAME, NAME=λ or NAME=λ@β") as caught:
        OperatorUse.parse(text)
    assert repr(text) in str(caught.value)


def fill(message: Message, counter: list[int]) -> Message:
    """Sets every field to a value that no other field has, but those with messages of its own kind."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type == message.DESCRIPTOR:
            continue
        counter[0] += 1
        many = field.is_repeated
        if field.message_type is not None:
            fill(getattr(message, field.name).add() if many else getattr(message, field.name), counter)
            continue
        value = {
            field.TYPE_STRING: f"text{counter[0]}",
            field.TYPE_ENUM: 2,
            field.TYPE_BOOL: True,
            field.TYPE_DOUBLE: counter[0] + 0.5,
        }.get(field.type, counter[0])
        if many:
            getattr(message, field.name).extend([value])
        else:
            setattr(message, field.name, value)
    return message


def told(message: Message, name: str):
    """What a message says in a field, in the client's terms."""
    value = getattr(message, name)
    if name == "finish_reason":
        return FinishReason(text_pb2.FinishReason.Name(value).removeprefix("FINISH_REASON_"))
    if name == "part":
        return sp.Positions.Part.Name(value).removeprefix("PART_").lower()
    if name.removeprefix("recommended_") in ("anchor", "first_token"):
        enum = {"anchor": sp.Anchor, "first_token": sp.FirstToken}[name.removeprefix("recommended_")]
        return enum.Name(value).removeprefix(f"{name.removeprefix('recommended_').upper()}_").lower()
    if name in ("rule", "recommended_rule"):
        return sp.Rule.Name(value).removeprefix("RULE_").lower()
    if name == "created":
        return value.ToDatetime(UTC)
    if isinstance(value, Message) and value.DESCRIPTOR.full_name == "google.protobuf.Duration":
        return value.seconds + value.nanos / 1e9
    return value


def assert_same(result, message: Message) -> None:
    for field in fields(result):
        ours, theirs = getattr(result, field.name), told(message, field.name)
        if is_dataclass(ours):
            assert_same(ours, theirs)
        elif isinstance(ours, tuple):
            assert len(ours) == len(theirs) > 0, field.name
            for one, other in zip(ours, theirs, strict=True):
                if is_dataclass(one):
                    assert_same(one, other)
                else:
                    assert one == other, field.name
        else:
            assert ours == theirs, field.name
            assert ours or isinstance(ours, (int, Enum)), field.name


@pytest.mark.parametrize(
    ("message", "read"),
    [
        (text_pb2.GenerateResponse(), decode.generation),
        (text_pb2.Delta(), decode.delta),
        (pb.GetModelInfoResponse(), decode.model_info),
        (pb.TokenizeResponse(), decode.tokenization),
        (ops.Operator(), decode.operator_info),
        (ops.ReloadOperatorsResponse(), decode.reload_report),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_every_field_of_an_answer_reaches_the_caller(message, read):
    message = fill(message, [0])
    result = read(message)
    assert_same(result, message)
    inside = {each.name for each in message.DESCRIPTOR.fields if each.message_type == message.DESCRIPTOR}
    assert {each.name for each in fields(result)} == {each.name for each in message.DESCRIPTOR.fields} - inside


def test_every_field_of_a_comparison_reaches_the_caller(make):
    text = decode.generation(make.response())
    message = fill(comparison_pb2.Comparison(), [0])
    result = decode.arm_result(message, text)
    assert result.generation is text
    assert result.first_divergence == message.first_divergence
    assert result.kl == KL(message.kl_mean, message.kl_p95, tuple(message.kl_per_token))
    assert (result.normal_perplexity, result.steered_perplexity) == (
        message.normal_perplexity,
        message.steered_perplexity,
    )


def test_a_comparison_that_was_not_scored_has_no_scores(make):
    result = decode.arm_result(comparison_pb2.Comparison(arm="steered"), decode.generation(make.response()))
    assert result.first_divergence is None
    assert result.kl is None
    assert result.normal_perplexity is None
    assert result.steered_perplexity is None


def test_a_divergence_at_the_first_token_is_not_the_absence_of_one(make):
    result = decode.arm_result(comparison_pb2.Comparison(first_divergence=0), decode.generation(make.response()))
    assert result.first_divergence == 0


@pytest.mark.parametrize("reason", list(FinishReason))
def test_every_finish_reason_has_its_name(make, reason):
    number = text_pb2.FinishReason.Value(f"FINISH_REASON_{reason}")
    assert decode.generation(make.response(finish_reason=number)).finish_reason is reason


def test_the_clients_finish_reasons_are_the_contracts():
    assert len(FinishReason) == len(text_pb2.FinishReason.keys()) - 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"finish_reason": 0}, "gave no finish reason"),
        ({"finish_reason": 99}, "update the client"),
        ({"usage": None}, "lacks `usage`"),
        ({"timings": None}, "lacks `timings`"),
        ({"timings": text_pb2.Timings()}, "lacks `queued`"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_a_protocol_error(make, changes, says):
    with pytest.raises(ProtocolError, match=says):
        decode.generation(make.response(**changes))


@pytest.mark.parametrize("number", [0, 9])
def test_a_receipt_with_an_unknown_rule_is_a_protocol_error(make, number):
    with pytest.raises(ProtocolError, match="rule in the receipt of 'golden-gate'"):
        decode.generation(make.response(receipts=[make.receipt(rule=number)]))


def test_an_unusable_operator_may_lack_what_could_not_be_read():
    info = decode.operator_info(ops.Operator(name="broken", problem="truncated"))
    assert not info.usable
    assert info.problem == "truncated"
    assert info.recommended_rule is None
    assert info.created is None


def test_a_usable_operator_without_a_rule_is_a_protocol_error():
    with pytest.raises(ProtocolError, match="recommended rule"):
        decode.operator_info(ops.Operator(name="odd"))


def test_the_time_of_building_is_in_utc():
    message = ops.Operator(name="a", recommended_rule=1)
    message.created.FromDatetime(datetime(2025, 3, 4, 5, 6, tzinfo=UTC))
    assert decode.operator_info(message).created == datetime(2025, 3, 4, 5, 6, tzinfo=UTC)


def test_results_are_frozen_and_plain(make):
    result = decode.generation(make.response(operators=("golden-gate",)))
    assert isinstance(result, Generation)
    with pytest.raises(AttributeError):
        result.text = "other"
    assert asdict(result)["receipts"][0]["operator"] == "golden-gate"
    assert decode.delta(text_pb2.Delta(text="x")) == TextDelta("x")
