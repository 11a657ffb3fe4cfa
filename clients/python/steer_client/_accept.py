"""What the wire cannot carry is refused here, because protobuf's own errors do not name the field.

Ranges are the server's to judge.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from itertools import starmap
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from steering.convert import FieldError, enum_numbers

from steer_client._requests import TokenBias

# google.protobuf.Duration reaches about ten thousand years.
_MAX_SECONDS = 315_576_000_000


def accept(field: FieldDescriptor, kind: Any, value: Any) -> Any:
    """See steering.convert.Accept. Raises FieldError for a value that the field cannot carry."""
    if kind is list:
        return items(_pairs(field, value), _plural(field))
    if field.enum_type is not None:
        return _enum_value(value, enum_numbers(field.enum_type))
    if field.message_type is None:
        return _SCALARS[field.type](value)
    if field.message_type.full_name == Duration.DESCRIPTOR.full_name:
        return _duration(value)
    if isinstance(kind, type) and not isinstance(value, kind):
        raise refused(_indefinite(kind.__name__), value)
    return value


def items(value: Any, wanted: str) -> list[Any]:
    """The items of a sequence, or of another iterable, which may be read only once."""
    # A text is a sequence of texts and bytes one of integers; neither is ever meant that way.
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        raise refused(wanted, value)
    return list(value)


def number(value: object) -> float:
    """What a double holds."""
    if isinstance(value, (bool, str, bytes)):
        raise refused("a number", value)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise refused("a number", value) from None


def refused(wanted: str, value: object) -> FieldError:
    """The error of a value that is not what is wanted."""
    shown = repr(value)
    if len(shown) > 60:
        shown = f"{shown[:57]}..."
    return FieldError(f"{wanted} is needed, not {shown}")


def _integer(low: int, high: int) -> Callable[[object], int]:
    def accept_integer(value: object) -> int:
        try:
            if isinstance(value, bool):
                raise TypeError
            integer = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise refused("an integer", value) from None
        if not low <= integer <= high:
            raise refused(f"an integer from {low} to {high}", value)
        return integer

    return accept_integer


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise refused("True or False", value)
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise refused("a text", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refused("text that UTF-8 can encode", value) from None
    return value


def _enum_value(value: object, numbers: Mapping[str, int]) -> str:
    if not isinstance(value, str) or value not in numbers:
        names = ", ".join(f'"{name}"' for name in numbers)
        raise refused(f"{names} or None", value)
    return value


def _duration(value: object) -> Duration:
    seconds = number(value)
    if not -_MAX_SECONDS <= seconds <= _MAX_SECONDS:
        raise refused(f"seconds within ±{_MAX_SECONDS}", value)
    whole, part = divmod(abs(seconds), 1)
    total = int(whole) * 10**9 + round(part * 1e9)
    sign = -1 if seconds < 0 else 1
    return Duration(seconds=sign * (total // 10**9), nanos=sign * (total % 10**9))


def _pairs(field: FieldDescriptor, value: Any) -> Any:
    """What a mapping stands for, where it does."""
    if isinstance(value, Mapping) and field.message_type is not None and field.message_type.name == "TokenBias":
        return starmap(TokenBias, value.items())
    return value


def _plural(field: FieldDescriptor) -> str:
    if field.message_type is not None and field.message_type.name == "TokenBias":
        return "a mapping of token ids to biases"
    if field.message_type is not None:
        return f"a sequence of {field.message_type.name}"
    return "texts" if field.type == FieldDescriptor.TYPE_STRING else "a sequence of integers"


def _indefinite(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOU' else 'a'} {noun}"


_SCALARS: Mapping[int, Callable[[object], object]] = {
    FieldDescriptor.TYPE_DOUBLE: number,
    FieldDescriptor.TYPE_INT32: _integer(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: _integer(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: _integer(0, 2**64 - 1),
    FieldDescriptor.TYPE_BOOL: _flag,
    FieldDescriptor.TYPE_STRING: _text,
}
