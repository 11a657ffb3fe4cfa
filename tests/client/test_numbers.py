"""Numbers within a text: what Python reads beyond decimal digits would be another number than was meant."""

import pytest
from steer_client import OperatorUse, Words
from steer_client import _numbers as of_the_client

from operators.core import numbers as of_the_builder
from steer_server.errors import InvalidRequestError
from steer_server.http.openai.steering import read_operator

_NO_NUMBERS = ["0_4", "nan", "inf", "-Infinity", "0x1p3", "٤", "1e1_0", "", ".", "1e", "--1", "1 0"]


@pytest.mark.parametrize("text", _NO_NUMBERS)
def test_a_strength_in_anything_but_decimal_digits_is_refused(text):
    for read in (of_the_client.read_decimal, of_the_builder.read_decimal):
        with pytest.raises(ValueError):  # noqa: PT011 - it says nothing but the text
            read(text)
    for setting in (f"ocean={text}", f"ocean=1@{text}"):
        with pytest.raises(ValueError, match="cannot read the operator"):
            OperatorUse.parse(setting)
        with pytest.raises(InvalidRequestError):
            read_operator(setting, "model")
    with pytest.raises(ValueError, match="cannot read the words"):
        Words.parse_words(f"coffee={text}")


@pytest.mark.parametrize(("text", "number"), [("0.4", 0.4), (".4", 0.4), ("4.", 4.0), ("-5", -5.0), ("1e-3", 1e-3)])
def test_a_decimal_number_is_read_alike_by_all(text, number):
    assert of_the_client.read_decimal(text) == of_the_builder.read_decimal(text) == number
    assert OperatorUse.parse(f"ocean={text}").strength == read_operator(f"ocean={text}", "model").strength == number


@pytest.mark.parametrize("text", ["1_0", "١", "1.0", ""])
def test_a_whole_number_has_decimal_digits_alone(text):
    for read in (of_the_client.read_whole, of_the_builder.read_whole):
        with pytest.raises(ValueError):  # noqa: PT011
            read(text)
