"""Every field of the contract is a field of the server's dataclass and of the client's, and crosses unchanged.

A field that is added to a message is checked here without a line of its own; a message that is added needs its row.
"""

import json
import math
import re
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from steer_client import _admin as asked
from steer_client import _decode as decode
from steer_client import _requests as requests
from steer_client import _results as results
from steer_client import _store as store
from steer_client._accept import accept
from steering.convert import enum_numbers, reader, writer
from steering.convert.fields import is_sequence, item_type, without_none
from steering.v1 import comparison_pb2, score_pb2, steering_pb2, text_pb2
from steering.v1 import generation_pb2 as pb
from steering.v1 import operator_admin_pb2 as admin
from steering.v1 import operators_pb2 as ops

from steer_server import types
from steer_server.registry import StoreChanges
from steer_server.rpc import admin_codec, codec
from steer_server.rpc.operator_codec import store_changes
from steer_server.types.limits import Bounded, Digest, NotEmpty, Range

FILES = (
    pb.DESCRIPTOR,
    text_pb2.DESCRIPTOR,
    comparison_pb2.DESCRIPTOR,
    score_pb2.DESCRIPTOR,
    steering_pb2.DESCRIPTOR,
    ops.DESCRIPTOR,
    admin.DESCRIPTOR,
)
ROOT = Path(__file__).resolve().parents[2]
TEXT = results.Generation("", "", (), results.FinishReason.EOS, None, None, None, (), (), 0)
LIMITS = ("server_version", "max_queue", "max_arms", "max_dose", "operator_admin")
# Of a message that the server makes of two: where the field's type is.
ELSEWHERE = {"GetModelInfoResponse.limits": types.RequestLimits}
read_limits = reader(pb.RequestLimits, types.RequestLimits)


def model_info(model, message):
    given = {name.removeprefix("server_"): getattr(message, name) for name in LIMITS}
    return codec.model_info(model, **given, limits=read_limits(message.limits))


# message: the server's dataclass, the client's, how the server sends it, how the client reads it.
RESULTS = {
    text_pb2.Started: (types.Started, None, lambda it, _: codec.generate_event(it).started, None),
    text_pb2.Delta: (types.Delta, results.TextDelta, lambda it, _: codec.generate_event(it).delta, decode.delta),
    text_pb2.GenerateResponse: (
        types.Completion,
        results.Generation,
        lambda it, _: codec.completion(it),
        decode.generation,
    ),
    comparison_pb2.Comparison: (
        types.Comparison,
        results.ArmResult,
        lambda it, _: codec.compare_event(types.Compared((it,))).compared.comparisons[0],
        partial(decode.arm_result, steered=TEXT),
    ),
    score_pb2.ScoreResponse: (
        types.TextScore,
        results.TextScore,
        lambda it, _: codec.text_score(it),
        decode.text_score,
    ),
    pb.TokenizeResponse: (
        types.Tokenization,
        results.Tokenization,
        lambda it, _: codec.tokenization(it),
        decode.tokenization,
    ),
    pb.GetModelInfoResponse: (types.ModelInfo, results.ModelInfo, model_info, decode.model_info),
    ops.ReloadOperatorsResponse: (
        StoreChanges,
        store.ReloadReport,
        lambda it, _: store_changes(it),
        decode.reload_report,
    ),
    admin.OperatorBuild: (types.OperatorBuild, asked.OperatorBuild, lambda it, _: admin_codec.build(it), decode.build),
}
# message: the server's dataclass, the client's, how the server reads it.
REQUESTS = {
    pb.GenerateRequest: (types.GenerationRequest, requests.GenerateRequest, codec.generation_request),
    comparison_pb2.CompareRequest: (types.CompareRequest, requests.CompareRequest, codec.compare_request),
    score_pb2.ScoreRequest: (types.ScoreRequest, requests.ScoreRequest, codec.score_request),
    pb.TokenizeRequest: (
        types.TokenizeRequest,
        requests.TokenizeRequest,
        lambda message: types.TokenizeRequest(codec.prompt(message.prompt)),
    ),
    admin.UploadStart: (types.UploadStart, asked.UploadStart, admin_codec.upload_start),
    admin.BuildOperatorRequest: (types.BuildRequest, asked.BuildOperatorRequest, admin_codec.build_request),
}
# Requests whose few fields the services take as they are.
TAKEN = {
    ops.GetOperatorRequest: requests.GetOperatorRequest,
    admin.GetUploadRequest: asked.GetUploadRequest,
    admin.LoadOperatorRequest: asked.OperatorName,
    admin.UnloadOperatorRequest: asked.OperatorName,
    admin.DeleteOperatorRequest: asked.DeleteOperatorRequest,
    admin.WatchBuildRequest: asked.BuildId,
    admin.CancelBuildRequest: asked.BuildId,
}
SIDES = {
    "server": {message: row[0] for message, row in (RESULTS | REQUESTS).items()},
    # Of ops.Operator, the server's side is tests/server/rpc/test_operator_codec.py: it is written from the artifact.
    "client": {message: row[1] for message, row in (RESULTS | REQUESTS).items() if row[1] is not None}
    | {ops.Operator: store.OperatorInfo}
    | TAKEN,
}
INSIDE_ITSELF = "GenerateResponse.more"
"""Other texts: the services put them together, the client's decoder takes them apart."""
OF_THE_STORE = "OperatorBuild.operator"
"""Written from the registry's entry, as `ops.Operator` is."""
LACKS = {
    # The configuration's, not the model's.
    "server": {INSIDE_ITSELF, OF_THE_STORE} | {f"GetModelInfoResponse.{name}" for name in (*LIMITS, "limits")},
    # Where ABResult has it, and what ArmResult.kl has in one.
    "client": {INSIDE_ITSELF}
    | {f"Comparison.{name}" for name in ("arm", "sample", "kl_mean", "kl_p95", "kl_per_token")},
}
NO_DATACLASS = {
    # Events and lists, which the services put together and the client's reducers take apart.
    *("GenerateEvent", "CompareEvent", "CompareFinished", "ListOperatorsResponse", "GetOperatorResponse"),
    # What the server alone names.
    "Started",
    # Stands for a tuple.
    "TokenIds",
    # An operator alone, a count, and a piece of a file.
    *("UploadOperatorResponse", "LoadOperatorResponse", "UnloadOperatorResponse"),
    *("GetUploadResponse", "UploadOperatorRequest", "ListBuildsResponse"),
    # Empty.
    *("ListOperatorsRequest", "ReloadOperatorsRequest", "GetModelInfoRequest", "DeleteOperatorResponse"),
    "ListBuildsRequest",
}


def without_limits(hint):
    return get_args(hint)[0] if hasattr(hint, "__metadata__") else hint


def one_of(field, hint):
    """The type of one value of a field."""
    kind, _ = without_none(without_limits(hint))
    return item_type(kind) if field.is_repeated else kind


def parts(field, kind):
    """The messages inside a field, each with its type; of one that stands for a tuple, those of the tuple."""
    nested = field.message_type
    if nested is None or nested.file.package != "steering.v1":
        return
    if is_sequence(kind):
        [only] = nested.fields
        yield from parts(only, one_of(only, kind))
    else:
        yield nested, kind


def walk(descriptor, cls):
    """(message, field, type or None) for every field of a message and of those inside it."""
    hints = get_type_hints(cls, include_extras=True)
    for field in descriptor.fields:
        hint = hints.get(field.name)
        yield descriptor.name, field, hint
        for nested in () if hint is None else parts(field, one_of(field, hint)):
            yield from walk(*nested)


@pytest.mark.parametrize("side", SIDES)
def test_every_field_of_the_contract_has_its_place(side):
    found = [each for message, cls in SIDES[side].items() for each in walk(message.DESCRIPTOR, cls)]
    assert {f"{message}.{field.name}" for message, field, hint in found if hint is None} == LACKS[side]


@pytest.mark.parametrize("side", SIDES)
def test_every_value_of_an_enum_has_its_name(side):
    found = {}
    for message, cls in SIDES[side].items():
        for _, field, hint in walk(message.DESCRIPTOR, cls):
            if field.enum_type is not None:
                kind = one_of(field, hint)
                found[field.enum_type.name] = {value.lower() for value in get_args(kind) or kind}
    nested = [enum for file in FILES for message in file.message_types_by_name.values() for enum in message.enum_types]
    enums = [enum for file in FILES for enum in file.enum_types_by_name.values()] + nested
    assert found == {enum.name: set(enum_numbers(enum)) for enum in enums}


def test_the_servers_defaults_are_those_that_the_contract_documents():
    source = (ROOT / "protos/steering/v1/text.proto").read_text(encoding="utf-8")
    [body] = re.findall(r"^message SamplingParams \{(.*?)^\}", source, re.MULTILINE | re.DOTALL)
    # A comment that ends with, say, "Default 1 (off).", and the field below it.
    field = r"Default:? ([\w.]+?)[ .].*\n *(?:optional )?[\w.]+ (\w+) ="
    documented = {name: default for default, name in re.findall(field, body)}
    # Beside each is what the server does with a request that leaves it unset.
    undocumented = {"stop_strings": (), "stop_token_ids": (), "logit_bias": (), "logprobs": None}
    assert documented.pop("seed") == "drawn"
    parsed = {name: None if text == "none" else json.loads(text) for name, text in documented.items()}
    declared = {field.name: field.default for field in fields(types.SamplingParams)}
    assert parsed | undocumented | {"seed": 0} == declared


def test_every_message_of_the_contract_is_accounted_for():
    contract = {name for file in FILES for name in file.message_types_by_name}
    walked = {message for top, cls in SIDES["client"].items() for message, _, _ in walk(top.DESCRIPTOR, cls)}
    assert contract == walked | NO_DATACLASS
    assert not walked & NO_DATACLASS


def messages(message, cls):
    """Messages, as the keywords of their constructor, that ``cls`` accepts."""
    hints = get_type_hints(cls, include_extras=True)
    hints |= {name.partition(".")[2]: kind for name, kind in ELSEWHERE.items() if name.startswith(f"{message.name}.")}
    values = {
        field.name: values_of(field, hints.get(field.name))
        for field in message.fields
        if f"{message.name}.{field.name}" not in (INSIDE_ITSELF, OF_THE_STORE)
    }
    for oneof in message.oneofs:
        if len(oneof.fields) > 1:
            one = st.one_of(st.fixed_dictionaries({field.name: values.pop(field.name)}) for field in oneof.fields)
            return st.builds(dict.__or__, st.fixed_dictionaries(values), one)
    return st.fixed_dictionaries(values)


def values_of(field, hint):
    """What a field may hold; None too, where it may be unset."""
    limits = getattr(hint, "__metadata__", ())
    kind, optional = without_none(without_limits(hint))
    if field.is_repeated:
        return st.lists(one_value(field, get_args(kind)[0], limits), min_size=least_size(limits), max_size=3)
    one = one_value(field, kind, limits)
    alternatives = field.containing_oneof is not None and len(field.containing_oneof.fields) > 1
    return st.none() | one if optional and not alternatives else one


def least_size(limits):
    return int(any(isinstance(limit, NotEmpty) for limit in limits))


def one_value(field, kind, limits):
    if field.message_type is Duration.DESCRIPTOR:
        return st.integers(1, 10**12).map(lambda us: Duration(seconds=us // 10**6, nanos=us % 10**6 * 1000))
    if field.message_type is Timestamp.DESCRIPTOR:
        return st.integers(0, 10**9).map(lambda seconds: Timestamp(seconds=seconds))
    if is_sequence(kind):
        [only] = field.message_type.fields
        return st.fixed_dictionaries({only.name: values_of(only, Annotated[kind, *limits] if limits else kind)})
    if field.message_type is not None:
        return messages(field.message_type, kind)
    bounds = next((limit for limit in limits if isinstance(limit, Range)), Range())
    texts = next((limit for limit in limits if isinstance(limit, Bounded)), Bounded(max_characters=8))
    low, high = max(bounds.minimum, bounds.above), bounds.maximum
    if field.enum_type is not None:
        return st.sampled_from(list(enum_numbers(field.enum_type).values()))
    if any(isinstance(limit, Digest) for limit in limits):
        return st.binary(min_size=32, max_size=32).map(lambda raw: f"sha256:{raw.hex()}")
    if field.type == field.TYPE_STRING:
        least = max(texts.min_characters, least_size(limits))
        return st.text(st.characters(codec="utf-8"), min_size=least, max_size=least + 8)
    if field.type == field.TYPE_BOOL:
        return st.booleans()
    if field.type == field.TYPE_DOUBLE:
        return st.floats(low, high, exclude_min=low == bounds.above > -math.inf, allow_nan=False).filter(math.isfinite)
    least, most = (0, 2**64 - 1) if field.type == field.TYPE_UINT64 else (-(2**31), 2**31 - 1)
    return st.integers(int(max(low, least)), int(min(high, most)))


def tie_comparison(made):
    tie_sampling(made.sampling)
    made.normal = made.normal or not made.arms
    if made.HasField("prompt"):
        del made.prompts[:]
    elif not made.prompts:
        made.prompts.add().prompt.text = "x"
    for index, prompt in enumerate(made.prompts):
        prompt.id = f"prompt {index}"
    for index, arm in enumerate(made.arms):
        arm.name = f"arm {index}"
        if not arm.operators:
            arm.sampling.SetInParent()
        arm.sampling.ClearField("time_limit")
        tie_sampling(arm.sampling)


def tie_sampling(sampling):
    for index, bias in enumerate(sampling.logit_bias):
        bias.token_id = index
    if sampling.min_tokens:
        sampling.max_tokens = max(sampling.min_tokens, sampling.max_tokens)


def tie_request(made):
    if hasattr(made, "sampling"):
        tie_sampling(made.sampling)
    for prompt in (made.prompt, *(each.prompt for each in getattr(made, "prompts", ()))):
        for index, option in enumerate(prompt.chat.template_options):
            option.name = f"option_{index}"
        if prompt.chat.continue_final_message:
            prompt.chat.messages[-1].role = "assistant"


def tie_build(made):
    for name in ("exact", "tolerance", "calibrate", "quick"):
        made.ClearField(name)


def drawn(data, message, cls):
    """A message that both sides accept: what ties its fields together is here."""
    made = message(**data.draw(messages(message.DESCRIPTOR, cls)))
    if hasattr(made, "prompt"):
        tie_request(made)
    if message is admin.BuildOperatorRequest:
        tie_build(made)
    if message is comparison_pb2.CompareRequest:
        tie_comparison(made)
        made.score = made.score or made.HasField("report")
    if message is score_pb2.ScoreRequest:
        for index, arm in enumerate(made.arms):
            arm.name = f"arm {index}"
            arm.ClearField("sampling")
            arm.operators.add(name="ocean")
    if message is comparison_pb2.Comparison and made.kl_per_token:
        made.kl_mean = max(made.kl_per_token)
    if message is score_pb2.ScoreResponse:
        for arm in made.arms:
            del arm.tokens[:]
            for token in made.token_ids:
                arm.tokens.add(token_id=token, token=str(token), logprob=-1.0, normal_logprob=-2.0, kl=0.5)
    if message is pb.TokenizeResponse:
        made.tokens[:] = map(str, made.token_ids)
    return made


def assert_same(server, client):
    """Every field that both dataclasses have has one value; the client has None for a text that is not there."""
    for field in fields(client):
        if not hasattr(server, field.name):
            continue
        ours, theirs = getattr(server, field.name), getattr(client, field.name)
        if not isinstance(ours, tuple):
            ours, theirs = (ours,), (theirs,)
        assert len(ours) == len(theirs), field.name
        for one, other in zip(ours, theirs, strict=True):
            if is_dataclass(one):
                assert_same(one, other)
            else:
                assert other == one or (one, other) == ("", None), field.name


@pytest.mark.parametrize("message", RESULTS, ids=lambda message: message.DESCRIPTOR.name)
@settings(max_examples=30)
@given(data=st.data())
def test_an_answer_reaches_the_client_as_the_server_has_it(message, data):
    cls, _, send, receive = RESULTS[message]
    sent = drawn(data, message, cls)
    answer = reader(message, cls)(sent)
    assert send(answer, sent) == sent
    if receive is not None:
        assert_same(answer, receive(message.FromString(sent.SerializeToString())))


def as_client(value, kind):
    """A value of the server's as the client's type for the same field."""
    kind, _ = without_none(kind)
    if isinstance(value, tuple):
        if is_dataclass(kind):
            [only] = fields(kind)
            return kind(as_client(value, get_type_hints(kind)[only.name]))
        return tuple(as_client(each, item_type(kind)) for each in value)
    if not is_dataclass(value):
        return value
    hints = get_type_hints(kind)
    return kind(**{name: as_client(getattr(value, name), hint) for name, hint in hints.items()})


@pytest.mark.parametrize("message", REQUESTS, ids=lambda message: message.DESCRIPTOR.name)
@settings(max_examples=60)
@given(data=st.data())
def test_a_request_reaches_the_server_as_the_client_has_it(message, data):
    cls, client, receive = REQUESTS[message]
    request = receive(drawn(data, message, cls))
    sent = writer(message, client, accept)(as_client(request, client))
    assert receive(message.FromString(sent.SerializeToString())) == request
