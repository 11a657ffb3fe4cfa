"""Raw messages against limits. The parsed message says what is in one; protobuf itself says what is one."""

import time
from contextlib import suppress

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from steering.convert import FieldError
from steering.measure import Limit, LimitError, Measure
from steering.v1 import comparison_pb2, text_pb2
from steering.v1 import generation_pb2 as pb
from steering.v1 import steering_pb2 as sp

ROOMY = Limit(size=1 << 16, count=1000)


class Everywhere(dict):
    """The same limit for every field, unless it has its own."""

    def get(self, name, default=None):
        return super().get(name, ROOMY)


def measure(message, own=(), *, max_messages=64, strict=True):
    limits = Everywhere({f"steering.v1.{name}": limit for name, limit in dict(own).items()})
    return Measure(message.DESCRIPTOR, limits, max_messages=max_messages, is_strict=lambda _: strict)


def block(number, content):
    """A field that has a length."""
    return bytes((number << 3 | 2,)) + varint(len(content)) + content


def varint(value):
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*parts, value))


def problem(checked, data):
    with pytest.raises(FieldError) as caught:
        checked.check(data)
    return caught.value


WORDS = comparison_pb2.CompareRequest(
    request_id="x",
    prompt=text_pb2.Prompt(chat=text_pb2.Chat(messages=[text_pb2.ChatMessage(role="user", content="hé")] * 3)),
    sampling=text_pb2.SamplingParams(
        seed=2**64 - 1, stop_strings=["a", ""], stop_token_ids=[1, 300, -1], temperature=0.5
    ),
    arms=[
        comparison_pb2.Arm(
            name="a",
            operators=[sp.OperatorUse(name="b", words=[sp.WeightedWord(text="c", weight=2)] * 2)],
        )
    ]
    * 2,
)


def test_a_message_within_the_limits_passes_whatever_is_in_it():
    measure(comparison_pb2.CompareRequest).check(WORDS.SerializeToString())
    measure(comparison_pb2.CompareRequest).check(b"")
    measure(pb.GetModelInfoRequest).check(b"")


@pytest.mark.parametrize(
    ("own", "path", "words"),
    [
        ({"CompareRequest.arms": Limit(count=1)}, "arms", "2 values"),
        ({"Arm.operators": Limit(count=0)}, "arms[0].operators", "1 values"),
        ({"OperatorUse.words": Limit(count=1)}, "arms[0].operators[0].words", "2 values"),
        ({"WeightedWord.text": Limit(size=0)}, "arms[0].operators[0].words[0].text", "1 bytes; at most 0"),
        ({"Chat.messages": Limit(count=2)}, "prompt.chat.messages", "3 values"),
        ({"ChatMessage.content": Limit(size=2)}, "prompt.chat.messages[0].content", "3 bytes; at most 2"),
        ({"Prompt.chat": Limit(size=5)}, "prompt.chat", "at most 5"),
        ({"SamplingParams.stop_strings": Limit(size=9, count=1)}, "sampling.stop_strings", "2 values"),
        ({"SamplingParams.stop_strings": Limit(size=0, count=9)}, "sampling.stop_strings[0]", "1 bytes"),
        ({"SamplingParams.stop_token_ids": Limit(count=2)}, "sampling.stop_token_ids", "3 values"),
        ({"CompareRequest.request_id": Limit(size=0)}, "request_id", "1 bytes"),
    ],
)
def test_the_field_that_has_too_much_is_named_with_what_it_has(own, path, words):
    found = problem(measure(comparison_pb2.CompareRequest, own), WORDS.SerializeToString())
    assert isinstance(found, LimitError)
    assert found.path == path
    assert words in found.problem


def test_messages_are_counted_at_all_depths_together():
    # chat and its 3 messages, prompt, sampling; two arms, each with an operator of two words.
    checked = measure(comparison_pb2.CompareRequest, max_messages=14)
    checked.check(WORDS.SerializeToString())
    assert (
        "more than 13"
        in problem(measure(comparison_pb2.CompareRequest, max_messages=13), WORDS.SerializeToString()).problem
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("number", [0, 127, 128, 2**31 - 1, -1])
def test_numbers_are_counted_packed_or_not_whatever_their_size(packed, number):
    one = varint(number % 2**64)
    ids = block(1, one * 7) if packed else (b"\x08" + one) * 7
    data = block(2, block(2, ids))
    assert len(pb.GenerateRequest.FromString(data).prompt.token_ids.ids) == 7
    measure(pb.GenerateRequest, {"TokenIds.ids": Limit(count=7)}).check(data)
    found = problem(measure(pb.GenerateRequest, {"TokenIds.ids": Limit(count=6)}), data)
    assert (found.path, found.found) == ("prompt.token_ids", 7)


def test_numbers_that_come_packed_and_one_by_one_are_counted_together():
    data = block(1, b"\x05" * 4) + b"\x08\x05" * 4 + block(1, b"\x05")
    assert len(text_pb2.TokenIds.FromString(data).ids) == 9
    measure(text_pb2.TokenIds, {"TokenIds.ids": Limit(count=9)}).check(data)
    assert problem(measure(text_pb2.TokenIds, {"TokenIds.ids": Limit(count=8)}), data).found == 9


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (block(1, b"a") + block(1, b"b"), "request_id"),
        (block(2, b"") * 2, "prompt"),
        (block(2, block(1, b"x") + block(2, b"")), "prompt.token_ids"),
        (block(2, block(1, b"x") * 2), "prompt.text"),
        (block(3, b"\x30\x01" * 2), "sampling.seed"),
    ],
)
def test_nothing_that_can_be_there_once_may_be_there_twice(data, path):
    pb.GenerateRequest.FromString(data)
    assert problem(measure(pb.GenerateRequest), data).path == path


@pytest.mark.parametrize("data", [b"\x7a\x00", b"\xf8\x07\x01", b"\x7d1234", b"\x7912345678"])
def test_a_field_that_is_not_known_is_refused_where_a_message_is_strict_and_let_through_elsewhere(data):
    assert "number" in problem(measure(pb.GenerateRequest), data).problem
    measure(pb.GenerateRequest, strict=False).check(data)


def test_unknown_fields_that_are_let_through_are_few():
    checked = measure(pb.GetModelInfoRequest, strict=False)
    checked.check(b"\x7a\x00" * 512)
    assert "at most" in problem(checked, b"\x7a\x00" * 513).problem


@settings(max_examples=300)
@given(data=st.binary(max_size=40) | st.binary(max_size=12).map(lambda more: WORDS.SerializeToString()[:60] + more))
def test_whatever_passes_is_a_message_but_for_its_letters(data):
    try:
        measure(comparison_pb2.CompareRequest).check(data)
    except FieldError:
        return
    try:
        comparison_pb2.CompareRequest.FromString(data)
    except DecodeError as error:
        assert "UTF-8" in str(error)  # noqa: PT017


@settings(max_examples=200)
@given(cut=st.integers(0, 400), place=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_message_that_was_cut_or_changed_raises_nothing_else(cut, place, byte):
    data = bytearray(WORDS.SerializeToString()[:cut])
    if place < len(data):
        data[place] = byte
    with suppress(FieldError):
        measure(comparison_pb2.CompareRequest).check(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"\x22\x00" * (8 << 20),
        block(2, block(3, b"\x0a\x00" * (8 << 20))),
        block(2, block(2, b"\x08\x05" * (8 << 20))),
        block(2, block(2, block(1, b"\x05" * (16 << 20)))),
        block(3, b"\x42\x00" * (8 << 20)),
        block(3, b"\x48\x00" * (8 << 20)),
        block(4, b"\x12\x00" * (8 << 20)),
        block(3, b"\x08\x00" * (8 << 20)),
        b"\x7a\x00" * (8 << 20),
        b"\x80" * (16 << 20),
    ],
    ids=["arms", "chat", "numbers", "packed", "stops", "ids", "operators", "twice", "unknown", "endless"],
)
def test_sixteen_megabytes_of_anything_are_refused_before_they_are_walked(data):
    began = time.process_time()
    problem(measure(comparison_pb2.CompareRequest), data)
    # Parsing them takes seconds; counting numbers one by one, some tenths.
    assert time.process_time() - began < 1.0


def test_every_list_and_every_text_needs_a_limit():
    with pytest.raises(ValueError, match=r"TokenIds\.ids is repeated and has no limit"):
        Measure(text_pb2.TokenIds.DESCRIPTOR, {}, max_messages=1, is_strict=lambda _: True)
    with pytest.raises(ValueError, match=r"Prompt\.text has a length and no limit"):
        Measure(text_pb2.Prompt.DESCRIPTOR, {}, max_messages=1, is_strict=lambda _: True)


def test_the_largest_message_within_the_limits_is_within_the_largest_size():
    limits = {
        "TokenIds.ids": Limit(count=50),
        "Prompt.text": Limit(size=500),
        "Chat.messages": Limit(count=2),
        "ChatMessage.role": Limit(size=10),
        "ChatMessage.content": Limit(size=100),
        "Chat.template_options": Limit(count=2),
        "TemplateOption.name": Limit(size=10),
        "TemplateOption.text": Limit(size=10),
    }
    limits = {f"steering.v1.{name}": limit for name, limit in limits.items()}
    checked = Measure(text_pb2.Prompt.DESCRIPTOR, limits, max_messages=9, is_strict=lambda _: True)
    for message in (text_pb2.Prompt(text="x" * 500), text_pb2.Prompt(token_ids=text_pb2.TokenIds(ids=[-1] * 50))):
        data = message.SerializeToString()
        checked.check(data)
        assert len(data) <= checked.max_bytes
    assert checked.max_bytes < 1200


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("half", [b"\x48\x80", b"\x48"], ids=["half a number", "no number"])
def test_numbers_that_come_one_by_one_are_counted_to_the_last(count, half):
    numbers = b"\x48\x81\x01" * count  # sampling.stop_token_ids, field 9, each with a tag of its own
    checked = measure(text_pb2.SamplingParams, {"SamplingParams.stop_token_ids": Limit(count=5000)})
    checked.check(numbers)
    with pytest.raises(DecodeError):
        text_pb2.SamplingParams.FromString(numbers + half)
    with pytest.raises(FieldError, match=r"stop_token_ids|no end|ends amid"):
        checked.check(numbers + half)
