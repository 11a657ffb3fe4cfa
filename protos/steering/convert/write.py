"""From objects to messages."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from datetime import datetime
from functools import cache, partial
from typing import Any, Protocol, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from steering.convert.fields import Convert, FieldError, enum_numbers, items

_M = TypeVar("_M", bound=Message, covariant=True)


class Writer(Protocol[_M]):
    """Makes a message of an object's attributes and of ``given``, which is what the message's constructor takes."""

    def __call__(self, source: object, /, **given: Any) -> _M:
        """Raises FieldError for what ``accept`` refuses."""


class Accept(Protocol):
    """Checks a value before it is written; returns what is written in its place. Raises FieldError."""

    def __call__(self, field: FieldDescriptor, value: Any, *, many: bool) -> Any:
        """``many``: the values of a repeated field together; each follows alone."""


def writer(message: type[_M], accept: Accept | None = None) -> Writer[_M]:
    """What turns an object into a message, each field from the attribute of its name; None leaves a field unset.

    Without ``accept``, values are taken to be of their types.
    """
    descriptor = cast("Descriptor", message.DESCRIPTOR)
    every_field = _keywords(descriptor, accept)

    @cache
    def without(names: frozenset[str]) -> Callable[[object], dict[str, Any]]:
        return _keywords(descriptor, accept, names)

    def write(source: object, /, **given: Any) -> _M:
        keywords = without(frozenset(given)) if given else every_field
        return message(**keywords(source), **given)

    return write


def oneof_writer(message: type[_M], kinds: Mapping[type, str]) -> Writer[_M]:
    """What turns an object of one of these classes into a message that has it in the field of that name."""
    fields = cast("Descriptor", message.DESCRIPTOR).fields_by_name
    writes = {cls: (name, _keywords(cast("Descriptor", fields[name].message_type))) for cls, name in kinds.items()}

    def write(source: object, /, **given: Any) -> _M:
        name, keywords = writes[type(source)]
        return message(**{name: keywords(source)}, **given)

    return write


def _keywords(
    descriptor: Descriptor, accept: Accept | None = None, without: Container[str] = ()
) -> Callable[[object], dict[str, Any]]:
    """What makes the keywords of a message's constructor; those of nested messages are dicts, which saves copies."""
    plain: list[str] = []
    converted: list[tuple[str, Convert]] = []
    for field in descriptor.fields:
        if field.name in without:
            continue
        write = _write_field(field, accept)
        if write is None:
            plain.append(field.name)
        else:
            converted.append((field.name, write))

    def keywords(source: object) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name in plain:
            values[name] = getattr(source, name)
        for name, write in converted:
            value = getattr(source, name)
            if value is None:
                continue
            try:
                values[name] = write(value)
            except FieldError as error:
                raise error.under(name) from None
        return values

    return keywords


def _write_field(field: FieldDescriptor, accept: Accept | None) -> Convert | None:
    """What converts the value of a field; None where it is written as it is."""
    convert = _write_one(field, accept)
    if accept is not None:
        convert = _after(partial(accept, field, many=False), convert)
    if not field.is_repeated or convert is None:
        return convert
    return items(convert) if accept is None else _after(partial(accept, field, many=True), items(convert))


def _write_one(field: FieldDescriptor, accept: Accept | None) -> Convert | None:
    """What converts one value; None for a scalar."""
    if field.enum_type is not None:
        numbers = enum_numbers(field.enum_type)
        return lambda value: numbers[value.lower()]
    if field.message_type is None:
        return None
    if field.message_type.full_name in _WELL_KNOWN:
        return _WELL_KNOWN[field.message_type.full_name]
    keywords = _keywords(field.message_type, accept)
    only = field.message_type.fields[0]
    if len(field.message_type.fields) > 1 or not only.is_repeated:
        return keywords
    every = _write_field(only, accept) or list
    return lambda value: {only.name: every(value)} if isinstance(value, list | tuple) else keywords(value)


def _after(first: Convert, then: Convert | None) -> Convert:
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
