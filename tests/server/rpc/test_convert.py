from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from steering.convert import FieldError, enum_numbers, oneof_writer, reader, writer
from steering.v1 import comparison_pb2, text_pb2
from steering.v1 import operators_pb2 as ops
from steering.v1 import steering_pb2 as sp


@dataclass(frozen=True)
class Positions:
    part: Literal["all", "prompt", "generated"]
    start: int
    end: int | None


@dataclass(frozen=True)
class Word:
    text: str
    weight: float | None


@dataclass(frozen=True)
class Use:
    name: str
    strength: float | None
    rule: Literal["cumulative", "substitute"] | None
    blend: float = 0.25
    positions: Positions | None = None
    anchor: Literal["contrast", "concept"] | None = None
    first_token: Literal["operator", "anchor"] | None = None
    words: tuple[Word, ...] = ()
    kl: float | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Arm:
    name: str
    operators: tuple[Use, ...]


@dataclass(frozen=True)
class Timings:
    queued: float
    time_to_first_token: float | None
    total: float


@dataclass(frozen=True)
class Started:
    request_id: str = field(metadata={"when_unset": lambda: "drawn"})
    prompt_token_ids: tuple[int, ...] = ()


def test_what_is_unset_is_none_or_the_default_or_what_the_field_says():
    assert reader(sp.OperatorUse, Use)(sp.OperatorUse(name="g")) == Use("g", None, None, 0.25)
    assert reader(sp.OperatorUse, Use)(sp.OperatorUse(strength=0, blend=0)) == Use("", 0.0, None, 0.0)
    assert reader(text_pb2.Started, Started)(text_pb2.Started()) == Started("drawn")
    assert reader(text_pb2.Started, Started)(text_pb2.Started(request_id="r")) == Started("r")


def test_none_is_left_unset():
    assert writer(sp.OperatorUse, Use)(Use("g", None, None, 0.0)) == sp.OperatorUse(name="g", blend=0.0)


def test_an_error_has_the_path_to_its_field_and_the_message_that_has_it():
    uses = [{"name": "a"}, {"name": "b", "rule": 9}]
    message = comparison_pb2.CompareRequest(arms=[{"name": "x"}, {"name": "y", "operators": uses}])

    @dataclass(frozen=True)
    class Request:
        arms: tuple[Arm, ...]

    with pytest.raises(FieldError) as caught:
        reader(comparison_pb2.CompareRequest, Request)(message)
    assert caught.value.path == "arms[1].operators[1].rule"
    assert caught.value.problem == "is 9; accepted: RULE_CUMULATIVE, RULE_SUBSTITUTE"
    assert (caught.value.number, caught.value.message) == (9, message.arms[1].operators[1])


def test_a_strict_reader_wants_every_message_that_nothing_can_stand_for():
    assert reader(text_pb2.Timings, Timings)(text_pb2.Timings()) == Timings(0.0, None, 0.0)
    with pytest.raises(FieldError, match="`queued` is not set") as caught:
        reader(text_pb2.Timings, Timings, strict=True)(text_pb2.Timings())
    assert (caught.value.path, caught.value.number) == ("queued", None)


@pytest.mark.parametrize("seconds", [0.0, 0.000001, 0.25, 1.0, 59.999999, 1e6, -0.25, -1.5])
def test_seconds_cross_as_a_duration_whose_parts_have_one_sign(seconds):
    message = writer(text_pb2.Timings, Timings)(Timings(seconds, None, 0.0))
    assert message.queued.ToTimedelta().total_seconds() == seconds
    assert message.queued.seconds * message.queued.nanos >= 0
    assert reader(text_pb2.Timings, Timings)(message).queued == pytest.approx(seconds, rel=1e-12)


def test_a_time_crosses_in_utc():
    @dataclass(frozen=True)
    class Built:
        created: datetime | None

    built = Built(datetime(2025, 3, 4, 5, 6, 7, tzinfo=UTC))
    stamp = Timestamp()
    stamp.FromDatetime(built.created)
    assert reader(ops.Operator, Built)(ops.Operator(created=stamp)) == built
    assert reader(ops.Operator, Built)(ops.Operator()) == Built(None)


def test_what_is_given_stands_beside_the_attributes_and_before_them():
    @dataclass(frozen=True)
    class Named:
        name: str

    write = writer(sp.OperatorUse, Named)
    given = dict.fromkeys(("blend", "positions", "anchor", "first_token", "kl", "digest"))
    given |= {"strength": 0.5, "rule": sp.RULE_SUBSTITUTE, "words": ()}
    assert write(Named("g"), **given) == sp.OperatorUse(name="g", strength=0.5, rule=sp.RULE_SUBSTITUTE)
    assert write(Named("g"), name="h", **given).name == "h"
    with pytest.raises(TypeError, match=r"Named has no field for steering\.v1\.OperatorUse\.strength"):
        write(Named("g"))


def test_an_event_stands_in_the_field_of_its_kind():
    write = oneof_writer(comparison_pb2.CompareEvent, {Started: "started"})
    event = write(Started("r", (1, 2)), arm="x")
    assert (event.arm, event.WhichOneof("event")) == ("x", "started")
    assert event.started == text_pb2.Started(request_id="r", prompt_token_ids=[1, 2])


def test_accept_sees_every_value_and_says_what_is_written():
    seen = []

    def accept(field, kind, value):
        seen.append((field.name, kind, value))
        return f"<{value}>" if field.name == "name" else value

    use = Use("g", 0.5, None)
    message = writer(comparison_pb2.Arm, Arm, accept)(Arm("x", (use, replace(use, name="h"))), sampling=None)
    assert [message.name, *(each.name for each in message.operators)] == ["<x>", "<g>", "<h>"]
    assert ("operators", list, (use, replace(use, name="h"))) in seen
    assert ("operators", Use, use) in seen
    assert ("strength", float, 0.5) in seen


def test_the_names_of_an_enum_are_without_its_prefix():
    assert enum_numbers(sp.Rule.DESCRIPTOR) == {"cumulative": 1, "substitute": 2}
    assert enum_numbers(text_pb2.FinishReason.DESCRIPTOR)["stop_string"] == text_pb2.FINISH_REASON_STOP_STRING
