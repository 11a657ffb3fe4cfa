"""Positions: what a text form means, and which positions of a text are among them."""

import pytest

from operators.core.apply import Setting
from operators.core.errors import SettingError
from operators.core.positions import Positions

PROMPT, TEXT = 6, 10


def members(positions):
    return [k for k in range(TEXT) if positions.count(k, k + 1, prompt_tokens=PROMPT)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", range(10)),
        ("first", [0]),
        ("prompt", range(6)),
        ("generated", range(6, 10)),
        ("4..", range(4, 10)),
        ("..8", range(8)),
        ("2..8", range(2, 8)),
        ("generated:..2", [6, 7]),
        ("generated:1..", [7, 8, 9]),
        ("prompt:3..", [3, 4, 5]),
        ("prompt:3..9", [3, 4, 5]),
        ("prompt:7..", []),
        ("9..20", [9]),
    ],
)
def test_a_text_form_means_these_positions_of_a_prompt_of_6_and_4_more_tokens(text, expected):
    positions = Positions.parse(text)
    assert members(positions) == list(expected)
    assert positions.count(0, TEXT, prompt_tokens=PROMPT) == len(expected)
    assert Positions.parse(str(positions)) == positions


@pytest.mark.parametrize("text", ["all", "first", "prompt", "generated", "2..8", "generated:1..2", "prompt:7..", "9.."])
@pytest.mark.parametrize(("first", "count"), [(0, 10), (0, 1), (3, 4), (6, 1), (7, 3)])
def test_the_slice_of_a_pass_holds_those_of_its_positions_that_are_among_them(text, first, count):
    positions = Positions.parse(text)
    found = range(first, first + count)[positions.among(first, count, prompt_tokens=PROMPT)]
    assert list(found) == [k for k in members(positions) if first <= k < first + count]


@pytest.mark.parametrize(
    "text", ["", "last", "-1..", "4", "4..4", "8..2", "..0", "a..b", "first:2..", ":1..", "prompt:", "1..2..3"]
)
def test_another_text_is_refused_and_the_accepted_forms_are_named(text):
    with pytest.raises(SettingError, match="positions"):
        Positions.parse(text)


def test_a_number_that_the_contract_cannot_carry_is_refused():
    with pytest.raises(SettingError, match=r"positions\.start"):
        Setting(0.5, "cumulative", 0.0, Positions(start=1 << 31))
    with pytest.raises(SettingError, match=r"positions\.part"):
        Setting(0.5, "cumulative", 0.0, Positions("everywhere"))
    with pytest.raises(SettingError, match=r"positions\.end"):
        Setting(0.5, "cumulative", 0.0, Positions(start=4, end=4))
