import math
from dataclasses import dataclass
from typing import Annotated

import pytest

from steer_server.errors import InvalidRequestError
from steer_server.types import Arm, CompareRequest, OperatorUse, Prompt, SamplingParams
from steer_server.types.limits import Bounded, NotEmpty, Range, check_fields


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("temperature", math.nan, "is nan; accepted: a finite number of 0 or more"),
        ("temperature", math.inf, "is inf; accepted: a finite number of 0 or more"),
        ("top_p", 0.0, "is 0.0; accepted: a number above 0, at most 1"),
        ("top_p", math.nan, "is nan; accepted: a number above 0, at most 1"),
        ("top_k", -1, "is -1; accepted: 0 (off) or more"),
        ("min_p", 1.5, "is 1.5; accepted: a number from 0 to 1"),
        ("repetition_penalty", 0.0, "is 0.0; accepted: a number from 0.01 to 100"),
        ("max_tokens", 0, "is 0; accepted: 1 or more"),
        ("logprobs", 21, "is 21; accepted: 0 to 20"),
        ("time_limit", 0.0, "is 0.0; accepted: a duration above 0"),
        ("stop_strings", ("a", ""), "is 2 strings of [1, 0] characters; accepted: at most 64, of 1 to 1024 characters"),
    ],
)
def test_an_error_says_the_field_the_value_and_what_is_accepted(name, value, problem):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value) == f"sampling.{name}: {problem}"


def test_the_ends_of_a_range_are_in_it_but_for_the_one_above():
    within = Range(0.5, 2.0).problem
    assert [within(value) is None for value in (0.5, 2.0, math.nextafter(0.5, 0), math.nextafter(2, 3))] == [
        *(True, True),
        *(False, False),
    ]
    assert Range(above=0.5).problem(0.5) == "is 0.5; accepted: a finite number above 0.5"
    assert Range(above=0.5).problem(math.nextafter(0.5, 1)) is None


def test_a_text_is_bounded_by_its_characters():
    assert Bounded(max_characters=2).problem("東京") is None
    assert Bounded(max_characters=2).problem("abc") == "has 3 characters; at most 2 are accepted"


@dataclass(frozen=True)
class Request:
    arms: Annotated[tuple[Arm, ...], NotEmpty("at least one arm is needed")]
    note: Annotated[str | None, Bounded(max_characters=1)] = None


def test_a_part_that_does_not_check_itself_is_checked_by_its_place():
    use = OperatorUse("golden")
    check_fields(Request((Arm("a", (use,)),)), "request")
    with pytest.raises(InvalidRequestError) as caught:
        check_fields(Request((Arm("a", (use,)), Arm("b", ()))), "request")
    assert str(caught.value) == (
        "request.arms[1].operators: is empty; an arm without operators needs a sampling of its own"
    )
    with pytest.raises(InvalidRequestError, match=r"^arms: is empty; at least one arm is needed"):
        check_fields(Request(()))


def test_the_items_of_a_tuple_of_numbers_are_not_looked_at_one_by_one():
    ids = range(1 << 20)

    class CountedTuple(tuple):
        def __iter__(self):
            pytest.fail("the items are looked at")

    assert len(Prompt(token_ids=CountedTuple(ids)).token_ids) == 1 << 20


def test_the_names_of_arms_are_not_compared_pair_by_pair():
    compared = []

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(1)
            return str.__eq__(self, other)

    use = (OperatorUse("golden"),)
    arms = tuple(Arm(Name(f"arm {index}"), use) for index in range(2000))
    CompareRequest("id", Prompt(text="a"), SamplingParams(), arms)
    assert len(compared) < 10 * len(arms)
    with pytest.raises(InvalidRequestError, match=r"arms\[0\]\.name"):
        CompareRequest("id", Prompt(text="a"), SamplingParams(), (*arms, arms[0]))
