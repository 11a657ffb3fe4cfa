"""Positions as a caller writes them."""

from dataclasses import astuple

import pytest
from steer_client import OperatorUse, Positions

from operators.core.positions import Positions as CorePositions


@pytest.mark.parametrize(
    "text", ["all", "first", "prompt", "generated", "4..", "..8", "2..8", "prompt:3..", "generated:..5"]
)
def test_positions_are_written_as_they_are_read(text):
    positions = Positions.parse(text)
    assert str(positions) == text
    # The operators' own reading: neither imports the other.
    assert astuple(CorePositions.parse(text)) == astuple(positions)
    spans = [(0, 10), (0, 6), (6, 10), (3, 4), (9, 9)]
    counts = [positions.count(*span, prompt_tokens=6) for span in spans]
    assert counts == [CorePositions.parse(text).count(*span, prompt_tokens=6) for span in spans]


@pytest.mark.parametrize("text", ["", "last", "4", "4..4", "8..2", "a..b", "first:2..", ":1..", "prompt:", "1..2..3"])
def test_other_positions_are_refused_with_what_is_accepted(text):
    with pytest.raises(ValueError, match="cannot read the positions"):
        OperatorUse.parse(f"a=0.4:{text}")
