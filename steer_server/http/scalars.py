"""Whether a JSON value is what a field of the contract takes: a number, a text, a name of an enum.

Checked before protobuf reads it: that takes other numbers than are there, the text 0_4 for 4 or true for 1, and what it
says of others are the words of a parser.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration

from operators.core.numbers import read_decimal, read_whole
from steer_server.errors import InvalidRequestError

_WHOLE = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = {FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE}
_NOT_FINITE = {"NaN", "Infinity", "-Infinity"}
"""As protobuf writes them."""
_MAX_SHOWN = 256
"""Characters."""


def check_scalar(field: FieldDescriptor, value: Any, place: str) -> None:
    """Raises :class:`InvalidRequestError` for a value, or one of a list of them, that the field does not take."""
    for index, each in enumerate(value) if field.is_repeated else ((None, value),):
        accepted = _accepted_instead(field, each)
        if accepted:
            at = place if index is None else f"{place}[{index}]"
            raise InvalidRequestError(at, f"is {_shown(each)}; {accepted} is accepted")


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds[type(value)]


def _accepted_instead(field: FieldDescriptor, value: Any) -> str:
    """What is accepted, of a value that is not; empty for one that is."""
    bounds = _WHOLE.get(field.cpp_type)
    if bounds is not None:
        whole, (low, high) = _whole(value), bounds
        if whole is None:
            return "a whole number"
        return f"at least {low}" if whole < low else f"at most {high}" if whole > high else ""
    if field.cpp_type in _FLOATS:
        return "" if _is_number(value) else "a number in decimal digits"
    if field.enum_type is not None:
        return "" if _is_of_enum(field.enum_type, value) else _one_of(field.enum_type)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return "" if isinstance(value, bool) else "true or false, without quotes,"
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return "" if isinstance(value, str) else "a text"
    if field.message_type is not None and field.message_type.full_name == Duration.DESCRIPTOR.full_name:
        return "" if _is_duration(value) else 'a text of seconds, such as "1.5s",'
    return ""


def _whole(value: Any) -> int | None:
    if type(value) is int:
        return value
    if isinstance(value, str) and value == value.strip(" "):
        try:
            return read_whole(value)
        except ValueError:
            # 1e3, and 7.0
            value = _decimal(value)
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value in _NOT_FINITE or _decimal(value) is not None
    return type(value) in (int, float)


def _is_of_enum(enum: EnumDescriptor, value: Any) -> bool:
    if isinstance(value, str) and value in enum.values_by_name:
        return True
    # Of a number that is none of its, the contract's own reading says what is accepted.
    low, high = _WHOLE[FieldDescriptor.CPPTYPE_INT32]
    whole = None if isinstance(value, float) else _whole(value)
    return whole is not None and low <= whole <= high


def _one_of(enum: EnumDescriptor) -> str:
    *others, last = [each.name for each in enum.values if each.number]
    return f"{', '.join(others)} or {last}" if others else last


def _is_duration(value: Any) -> bool:
    if not isinstance(value, str) or _decimal(value.removesuffix("s")) is None:
        return False
    try:
        Duration().FromJsonString(value)
    except ValueError:
        return False
    return True


def _decimal(text: str) -> float | None:
    try:
        return read_decimal(text)
    except ValueError:
        return None


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value[:_MAX_SHOWN])
    return repr(value)[:_MAX_SHOWN] if isinstance(value, int | float) else kind_of(value)
