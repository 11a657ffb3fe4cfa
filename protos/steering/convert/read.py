"""From messages to dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import MISSING, Field, fields
from datetime import UTC
from functools import cache, partial
from operator import attrgetter
from typing import Any, Protocol, TypeVar, cast, get_args, get_type_hints

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from steering.convert.fields import WHEN_UNSET, Convert, FieldError, enum_numbers, is_sequence, items, without_none

_T = TypeVar("_T", covariant=True)
_LEFT_OUT: Any = object()
_WELL_KNOWN: dict[str, Convert] = {
    "google.protobuf.Duration": lambda message: message.seconds + message.nanos / 1e9,
    "google.protobuf.Timestamp": lambda message: message.ToDatetime(UTC),
}


class Reader(Protocol[_T]):
    """Makes a dataclass of a message and of ``given``, the fields that the message does not have."""

    def __call__(self, message: Message, /, **given: Any) -> _T:
        """Raises FieldError for a value of an enum that the dataclass does not know, or a message that is not set."""


def reader(message: type[Message], cls: type[_T], *, strict: bool = False) -> Reader[_T]:
    """What turns a message into a dataclass. Fields of the message that the dataclass lacks are left out.

    ``strict``: a nested message must be set where neither None nor a default can stand for it; else it is read as an
    empty one. The reader raises TypeError where the dataclass needs more than is in the message and given.
    """
    descriptor = cast("Descriptor", message.DESCRIPTOR)

    @cache
    def reading(given: frozenset[str]) -> Reader[_T]:
        return _reader(descriptor, cls, strict, given)

    return lambda message, /, **given: reading(frozenset(given))(message, **given)


def _reader(descriptor: Descriptor, cls: type[_T], strict: bool, without: Container[str] = ()) -> Reader[_T]:
    hints = get_type_hints(cls)
    plain: list[str] = []
    converted: list[tuple[str, Convert]] = []
    for declared in fields(cls):  # type: ignore[arg-type]
        if declared.name in without:
            continue
        field = descriptor.fields_by_name.get(declared.name)
        if field is None:
            if _has_default(declared):
                continue
            raise TypeError(f"{cls.__name__}.{declared.name} is no field of {descriptor.full_name}")
        read = _read_field(field, hints[declared.name], declared, strict)
        if read is None:
            plain.append(field.name)
        else:
            converted.append((field.name, read))

    def read_message(message: Message, /, **given: Any) -> _T:
        values: dict[str, Any] = {}
        for name in plain:
            values[name] = getattr(message, name)
        for name, read in converted:
            try:
                value = read(message)
            except FieldError as error:
                raise error.under(name, message) from None
            if value is not _LEFT_OUT:
                values[name] = value
        return cls(**values, **given)

    return read_message


def _read_field(field: FieldDescriptor, hint: Any, declared: Field[Any], strict: bool) -> Convert | None:
    """What reads one field of a message; None where its value is taken as it is."""
    get = attrgetter(field.name)
    if field.is_repeated:
        return _read_items(field, hint, strict)
    hint, optional = without_none(hint)
    convert = _read_one(field, hint, strict)
    unset = declared.metadata.get(WHEN_UNSET) or _unset(field, optional, _has_default(declared), strict)
    if unset is None:
        return None if convert is None else lambda message: convert(get(message))
    is_set: Convert = (lambda message: message.HasField(field.name)) if field.has_presence else get
    if convert is None:
        return lambda message: get(message) if is_set(message) else unset()
    return lambda message: convert(get(message)) if is_set(message) else unset()


def _read_items(field: FieldDescriptor, hint: Any, strict: bool) -> Convert:
    """What reads a repeated field as the tuple that ``hint`` is."""
    get = attrgetter(field.name)
    convert = _read_one(field, get_args(hint)[0], strict)
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
        return _read_items(field.message_type.fields[0], hint, strict)
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


def _unset(field: FieldDescriptor, optional: bool, has_default: bool, strict: bool) -> Callable[[], Any] | None:
    """What makes the value of a field that is not set; None where the field's empty value stands for it."""
    if optional:
        return lambda: None
    if field.has_presence and has_default:
        return lambda: _LEFT_OUT
    if field.has_presence and strict:
        return partial(_refuse_unset, field.name)
    return None


def _refuse_unset(name: str) -> Any:
    raise FieldError(f"`{name}` is not set")


def _has_default(declared: Field[Any]) -> bool:
    return declared.default is not MISSING or declared.default_factory is not MISSING
