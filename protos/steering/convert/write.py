"""From objects to messages."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from datetime import datetime
from functools import cache, partial
from typing import Any, Protocol, TypeVar, cast, get_type_hints

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from steering.convert.fields import Convert, FieldError, enum_numbers, is_sequence, item_type, items, without_none

_M = TypeVar("_M", bound=Message, covariant=True)


class Writer(Protocol[_M]):
    """Makes a message of an object's attributes and of ``given``, which is what the message's constructor takes."""

    def __call__(self, source: object, /, **given: Any) -> _M:
        """Raises FieldError for what ``accept`` refuses."""


class Accept(Protocol):
    """Checks values before they are written."""

    def __call__(self, field: FieldDescriptor, kind: Any, value: Any) -> Any:
        """What is written in place of ``value``. Raises FieldError.

        ``kind``: the type that the dataclass gives to the value; ``list`` for the values of a repeated field together,
        each of which follows alone.
        """


def writer(message: type[_M], cls: type, accept: Accept | None = None) -> Writer[_M]:
    """What turns an object of a class into a message, each field from the attribute of its name; None leaves it unset.

    Without ``accept``, values are taken to be of their types. The writer raises TypeError where the class lacks a field
    that is not given.
    """
    descriptor = cast("Descriptor", message.DESCRIPTOR)

    @cache
    def keywords(given: frozenset[str]) -> Callable[[object], dict[str, Any]]:
        return _keywords(descriptor, cls, accept, given)

    return lambda source, /, **given: message(**keywords(frozenset(given))(source), **given)


def oneof_writer(message: type[_M], kinds: Mapping[type, str], *, without: Container[str] = ()) -> Writer[_M]:
    """What turns an object of one of these classes into a message that has it in the field of that name.

    ``without``: fields of the inner messages that are left unset.
    """
    fields = cast("Descriptor", message.DESCRIPTOR).fields_by_name
    keywords = {
        cls: (name, _keywords(cast("Descriptor", fields[name].message_type), cls, None, without))
        for cls, name in kinds.items()
    }

    def write(source: object, /, **given: Any) -> _M:
        name, of_source = keywords[type(source)]
        return message(**{name: of_source(source)}, **given)

    return write


def _keywords(
    descriptor: Descriptor, cls: type, accept: Accept | None = None, without: Container[str] = ()
) -> Callable[[object], dict[str, Any]]:
    """What makes the keywords of a message's constructor; those of nested messages are dicts, which saves copies."""
    hints = get_type_hints(cls)
    plain: list[str] = []
    converted: list[tuple[str, Convert, bool]] = []
    for field in descriptor.fields:
        if field.name in without:
            continue
        if field.name not in hints:
            raise TypeError(f"{cls.__name__} has no field for {field.full_name}")
        kind, optional = without_none(hints[field.name])
        write = _write_field(field, kind, accept)
        if write is None:
            plain.append(field.name)
        else:
            # A None that should not be is left to ``accept``.
            converted.append((field.name, write, optional or accept is None))

    def keywords(source: object) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name in plain:
            values[name] = getattr(source, name)
        for name, write, may_be_none in converted:
            value = getattr(source, name)
            if value is None and may_be_none:
                continue
            try:
                values[name] = write(value)
            except FieldError as error:
                raise error.prepend(name) from None
        return values

    return keywords


def _write_field(field: FieldDescriptor, kind: Any, accept: Accept | None) -> Convert | None:
    """What converts the value of a field; None where it is written as it is."""
    if not field.is_repeated:
        return _write_one(field, kind, accept)
    convert = _write_one(field, item_type(kind), accept)
    if convert is None:
        return None
    return items(convert) if accept is None else _compose(partial(accept, field, list), items(convert))


def _write_one(field: FieldDescriptor, kind: Any, accept: Accept | None) -> Convert | None:
    """What converts one value; None for a scalar that nobody checks."""
    convert = _write_trusted(field, kind, accept)
    return convert if accept is None else _compose(partial(accept, field, kind), convert)


def _write_trusted(field: FieldDescriptor, kind: Any, accept: Accept | None) -> Convert | None:
    if field.enum_type is not None:
        numbers = enum_numbers(field.enum_type)
        return lambda value: numbers[value.lower()]
    if field.message_type is None:
        return None
    if is_sequence(kind):
        [only] = field.message_type.fields
        write = _write_field(only, kind, accept) or list
        return lambda value: {only.name: write(value)}
    return _WELL_KNOWN.get(field.message_type.full_name) or _keywords(field.message_type, kind, accept)


def _compose(first: Convert, then: Convert | None) -> Convert:
    return first if then is None else lambda value: then(first(value))


def _duration(seconds: float | Duration) -> Duration | dict[str, int]:
    """In microseconds; one that is finer is given as a message."""
    if isinstance(seconds, Duration):
        return seconds
    micros = round(seconds * 1e6)
    sign = -1 if micros < 0 else 1
    return {"seconds": sign * (abs(micros) // 10**6), "nanos": sign * (abs(micros) % 10**6) * 1000}


def _timestamp(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message


_WELL_KNOWN: dict[str, Convert] = {"google.protobuf.Duration": _duration, "google.protobuf.Timestamp": _timestamp}
