"""From messages to dataclasses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from datetime import UTC
from functools import partial
from operator import attrgetter
from typing import Any, Protocol, TypeVar, cast, get_args, get_type_hints

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from steering.convert.fields import (
    WHEN_UNSET,
    Convert,
    FieldError,
    enum_numbers,
    is_sequence,
    item_type,
    items,
    without_none,
)

_T = TypeVar("_T", covariant=True)
_WELL_KNOWN: dict[str, Convert] = {
    "google.protobuf.Duration": lambda message: message.seconds + message.nanos / 1e9,
    "google.protobuf.Timestamp": lambda message: message.ToDatetime(UTC),
}


class Reader(Protocol[_T]):
    """Makes a dataclass of a message; ``given`` are fields that the message does not have."""

    def __call__(self, message: Message, /, **given: Any) -> _T:
        """Raises FieldError for a value of an enum that the dataclass does not know, or a message that is not set."""


def reader(message: type[Message], cls: type[_T], *, strict: bool = False) -> Reader[_T]:
    """What turns a message into a dataclass. Fields of the message that the dataclass lacks are left out.

    ``strict``: a nested message must be set where neither None nor a default can stand for it; else it is read as an
    empty one.
    """
    return _reader(cast("Descriptor", message.DESCRIPTOR), cls, strict)


def _reader(descriptor: Descriptor, cls: type[_T], strict: bool) -> Reader[_T]:
    hints = get_type_hints(cls)
    declared = fields(cls)  # type: ignore[arg-type]
    known = [each for each in declared if each.name in descriptor.fields_by_name]
    names = [each.name for each in known]
    reads = [_read_field(descriptor.fields_by_name[each.name], hints[each.name], each, strict) for each in known]
    if len(declared) == len(known) > 1 and not any(reads):
        get = attrgetter(*names)
        return cast("Reader[_T]", lambda message: cls(*get(message)))  # nothing is left to be given
    in_order = known == list(declared[: len(known)])
    steps = [read or attrgetter(name) for name, read in zip(names, reads, strict=True)]

    def read_message(message: Message, /, **given: Any) -> _T:
        values: list[Any] = []
        try:
            for step in steps:
                values.append(step(message))  # noqa: PERF401 - after an error, the length tells whose it is
        except FieldError as error:
            raise error.prepend(names[len(values)], message) from None
        return cls(*values, **given) if in_order else cls(**dict(zip(names, values, strict=True)), **given)

    return read_message


def _read_field(field: FieldDescriptor, hint: Any, declared: Field[Any], strict: bool) -> Convert | None:
    """What reads one field of a message; None where its value is taken as it is."""
    get = attrgetter(field.name)
    if field.is_repeated:
        return _read_items(field, hint, strict)
    hint, optional = without_none(hint)
    convert = _read_one(field, hint, strict)
    unset = declared.metadata.get(WHEN_UNSET) or _unset(field, optional, declared, strict)
    if unset is None:
        return None if convert is None else lambda message: convert(get(message))
    is_set: Convert = (lambda message: message.HasField(field.name)) if field.has_presence else get
    if convert is None:
        return lambda message: get(message) if is_set(message) else unset()
    return lambda message: convert(get(message)) if is_set(message) else unset()


def _read_items(field: FieldDescriptor, hint: Any, strict: bool) -> Convert:
    """What reads a repeated field as the tuple that ``hint`` is."""
    get = attrgetter(field.name)
    convert = _read_one(field, item_type(hint), strict)
    if convert is None:
        return lambda message: tuple(get(message))
    every = items(convert)
    return lambda message: tuple(every(get(message)))


def _read_one(field: FieldDescriptor, hint: Any, strict: bool) -> Convert | None:
    """What converts one value as a message has it; None for a scalar."""
    if field.enum_type is not None:
        return _read_enum(field.enum_type, hint)
    if field.message_type is None:
        return None
    if is_sequence(hint):
        [only] = field.message_type.fields
        return _read_items(only, hint, strict)
    return _WELL_KNOWN.get(field.message_type.full_name) or _reader(field.message_type, hint, strict)


def _read_enum(enum: EnumDescriptor, hint: Any) -> Convert:
    numbers = enum_numbers(enum)
    values = {numbers[value.lower()]: value for value in get_args(hint) or hint}
    accepted = ", ".join(enum.values_by_number[number].name for number in values)

    def read(number: int) -> Any:
        if number not in values:
            raise FieldError(f"is {number}; accepted: {accepted}", number=number)
        return values[number]

    return read


def _unset(field: FieldDescriptor, optional: bool, declared: Field[Any], strict: bool) -> Callable[[], Any] | None:
    """What makes the value of a field that is not set; None where the field's empty value stands for it."""
    if optional:
        return lambda: None
    if not field.has_presence:
        return None
    if declared.default is not MISSING:
        return lambda: declared.default
    return partial(_refuse_unset, field.name) if strict else None


def _refuse_unset(name: str) -> Any:
    raise FieldError(f"`{name}` is not set")
