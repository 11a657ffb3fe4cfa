"""Sampling parameters to protobuf."""

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steer_client import SamplingParams, TokenBias
from steer_client import _encode as encode
from steering.v1 import text_pb2

INT32 = st.integers(-(2**31), 2**31 - 1)
NUMBERS = st.floats(allow_nan=False)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)


def maybe(values):
    return st.none() | values


SAMPLING = st.builds(
    SamplingParams,
    temperature=maybe(NUMBERS),
    top_p=maybe(NUMBERS),
    top_k=maybe(INT32),
    min_p=maybe(NUMBERS),
    repetition_penalty=maybe(NUMBERS),
    seed=maybe(st.integers(0, 2**64 - 1)),
    max_tokens=maybe(INT32),
    stop_strings=st.lists(TEXTS, max_size=3),
    stop_token_ids=st.lists(INT32, max_size=3),
    ignore_eos=maybe(st.booleans()),
    logprobs=maybe(INT32),
    time_limit=maybe(st.integers(-(10**12), 10**12).map(lambda ms: ms / 1000)),
    presence_penalty=maybe(NUMBERS),
    frequency_penalty=maybe(NUMBERS),
    logit_bias=st.dictionaries(INT32, NUMBERS, max_size=3),
    min_tokens=maybe(INT32),
    skip_special_tokens=maybe(st.booleans()),
)


@settings(max_examples=60)
@given(SAMPLING)
def test_a_sampling_value_is_on_the_wire_exactly_when_it_is_set_and_as_it_was_set(sampling):
    sent = text_pb2.SamplingParams.FromString(
        encode.generate_request("hi", (), sampling, "").sampling.SerializeToString()
    )
    for each in fields(SamplingParams):
        value = getattr(sampling, each.name)
        if each.name in ("stop_strings", "stop_token_ids"):
            assert list(getattr(sent, each.name)) == list(value)
            continue
        if each.name == "logit_bias":
            assert {bias.token_id: bias.bias for bias in sent.logit_bias} == value
            continue
        assert sent.HasField(each.name) == (value is not None), each.name
        if value is None:
            continue
        on_wire = getattr(sent, each.name)
        if each.name == "time_limit":
            assert on_wire.seconds + on_wire.nanos / 1e9 == pytest.approx(value, abs=1e-6)
            assert on_wire.seconds * on_wire.nanos >= 0, "seconds and nanos of a Duration have one sign"
        else:
            assert on_wire == value


def test_zero_is_not_unset():
    zeros = SamplingParams(
        temperature=0,
        top_k=0,
        min_p=0,
        seed=0,
        max_tokens=0,
        ignore_eos=False,
        logprobs=0,
        time_limit=0,
        presence_penalty=0,
        frequency_penalty=0,
        min_tokens=0,
        skip_special_tokens=False,
    )
    sent = encode.generate_request("hi", (), zeros, "").sampling
    assert {each.name for each, _ in sent.ListFields()} == {
        "temperature",
        "top_k",
        "min_p",
        "seed",
        "max_tokens",
        "ignore_eos",
        "logprobs",
        "time_limit",
        "presence_penalty",
        "frequency_penalty",
        "min_tokens",
        "skip_special_tokens",
    }


def test_biases_may_be_a_sequence_too_and_the_server_judges_it():
    biases = [TokenBias(5, 1.0), TokenBias(5, -1.0)]
    sent = encode.generate_request("hi", (), SamplingParams(logit_bias=biases), "").sampling.logit_bias
    assert [(each.token_id, each.bias) for each in sent] == [(5, 1.0), (5, -1.0)]
