"""Serialised messages held against limits before they are parsed.

A parsed message can take a hundred times the bytes that it came in. So the bytes are walked first, and no object is
made of them: values of each repeated field and bytes of each field with a length are counted, and the walk ends at the
first that are too many. What it costs is bounded by the limits: texts and packed numbers are stepped over.

Stricter than the wire format in two places, so that nothing that was sent is dropped in silence: a field that is not
repeated may be there once, and so may one member of a oneof; and a strict message has known fields only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from steering.convert.fields import FieldError

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_CONTINUED = bytes(range(0x80, 0x100))
"""Bytes of a varint that are not its last."""
_ONE_VARINT = re.compile(rb"[\x80-\xff]{0,9}[\x00-\x7f]", re.DOTALL)
_MAX_HEAD = 10
"""Bytes of a tag and a length, each of a number below 2^35."""
_LARGEST_NUMBER = 10
"""Bytes."""
_MAX_UNKNOWN = 1024
"""Bytes of unknown fields, where they are let through."""
_WIRE_TYPES = {
    FieldDescriptor.TYPE_DOUBLE: _FIXED64,
    FieldDescriptor.TYPE_FIXED64: _FIXED64,
    FieldDescriptor.TYPE_SFIXED64: _FIXED64,
    FieldDescriptor.TYPE_FLOAT: _FIXED32,
    FieldDescriptor.TYPE_FIXED32: _FIXED32,
    FieldDescriptor.TYPE_SFIXED32: _FIXED32,
    FieldDescriptor.TYPE_STRING: _LENGTH,
    FieldDescriptor.TYPE_BYTES: _LENGTH,
    FieldDescriptor.TYPE_MESSAGE: _LENGTH,
}


@dataclass(frozen=True)
class Limit:
    """Of one field; None where it does not apply."""

    size: int | None = None
    """Bytes of each value that has a length: a text, bytes, a message."""
    count: int | None = None
    """Values of a repeated field."""
    total: int | None = None
    """Bytes of all values of a repeated field together."""
    instead_of: str = ""
    """Another field of the message, in place of which this one is given: no message has both at their largest."""


class LimitError(FieldError):
    """A field has more than its limit."""

    def __init__(self, problem: str, field: FieldDescriptor, found: int) -> None:
        """``found``: so many values, or bytes in one of them."""
        super().__init__(problem)
        self.field, self.found = field, found


class Measure:
    """The limits of one kind of message, and of the messages inside it."""

    def __init__(
        self,
        message: Descriptor,
        limits: Mapping[str, Limit],
        *,
        max_messages: int,
        is_strict: Callable[[Descriptor], bool],
    ) -> None:
        """``limits`` are by the full name of the field; every repeated field and every text must have its own.

        Args:
            max_messages: most messages that one may hold, at all depths together.
            is_strict: whether the fields of a message must be known.

        Raises:
            ValueError: a field lacks its limit.
        """
        self._max_messages = max_messages
        self._kind = _Kind(message, limits, is_strict)
        self.max_bytes: int = self._kind.max_bytes + (0 if self._kind.is_strict else _MAX_UNKNOWN)
        """Bytes of the largest message within the limits."""

    def check(self, data: bytes) -> None:
        """Raises :class:`FieldError` for a message that is not within the limits, or is none."""
        if not self._kind.is_strict and len(data) > self.max_bytes:
            raise FieldError(f"has {len(data)} bytes; at most {self.max_bytes} are accepted")
        _Walk(data, self._max_messages).message(self._kind, 0, len(data))


class _Kind:
    """A kind of message: its fields, by tag."""

    def __init__(
        self,
        message: Descriptor,
        limits: Mapping[str, Limit],
        is_strict: Callable[[Descriptor], bool],
        around: tuple[str, ...] = (),
    ) -> None:
        if message.full_name in around:
            raise ValueError(f"{message.full_name} is inside itself, and so has no limit")
        self.name, self.is_strict = message.name, is_strict(message)
        # A message that holds a list and nothing else stands for the list, in paths too.
        self.is_list = len(message.fields) == 1 and message.fields[0].is_repeated
        self.fields: dict[int, _Field] = {}
        self.names = {field.number: field.name for field in message.fields}
        largest: dict[str, int] = {}
        for each in message.fields:
            nested = each.message_type
            inside = None if nested is None else _Kind(nested, limits, is_strict, (*around, message.full_name))
            field = _Field(each, limits.get(each.full_name, Limit()), inside)
            self.fields[each.number << 3 | field.wire_type] = field
            if field.run is not None:
                self.fields[each.number << 3 | _LENGTH] = field
            share = field.instead_of or field.group
            largest[share] = max(largest.get(share, 0), field.max_bytes)
        self.max_bytes = sum(largest.values())


class _Field:
    """What is known of one field before any message comes."""

    def __init__(self, field: FieldDescriptor, limit: Limit, inside: _Kind | None) -> None:
        self.descriptor, self.name, self.inside = field, field.name, inside
        self.wire_type = _WIRE_TYPES.get(field.type, _VARINT)
        if field.is_repeated and limit.count is None:
            raise ValueError(f"{field.full_name} is repeated and has no limit")
        if self.wire_type == _LENGTH and inside is None and limit.size is None:
            raise ValueError(f"{field.full_name} has a length and no limit")
        if field.is_repeated and self.wire_type in _FIXED:
            raise ValueError(f"{field.full_name}: numbers of one size in a list are not counted yet")
        self.count = limit.count if field.is_repeated and limit.count is not None else 1
        self.size = limit.size
        """None: of a message, whose own fields have theirs."""
        self.total, self.instead_of = limit.total, limit.instead_of
        self.group = field.name if field.containing_oneof is None else field.containing_oneof.name
        self.run: re.Pattern[bytes] | None = None
        if field.is_repeated and self.wire_type == _VARINT:
            # Numbers that come one by one are counted many in a step: as many as matching them takes little memory for.
            tag = re.escape(_to_varint(field.number << 3))
            self.run = re.compile(b"(?:" + tag + b"[\x80-\xff]{0,9}[\x00-\x7f]){1,1024}", re.DOTALL)

    @cached_property
    def max_bytes(self) -> int:
        """Of all the values that it may have."""
        inside = 0 if self.inside is None else self.inside.max_bytes
        values = self.count * max(_LARGEST_NUMBER, inside if self.size is None else self.size)
        return self.count * _MAX_HEAD + (values if self.total is None else min(values, self.total))


class _Walk:
    """Through the bytes of one message."""

    def __init__(self, data: bytes, max_messages: int) -> None:
        self._data, self._left, self._max_messages = data, max_messages, max_messages

    def message(self, kind: _Kind, at: int, end: int) -> None:
        """Walks the message whose fields are the bytes from ``at`` to ``end``."""
        counts: dict[str, int] = {}
        sizes: dict[str, int] = {}
        while at < end:
            begin = at
            tag, at = self._varint(kind, at, end)
            field = kind.fields.get(tag)
            if field is None:
                at = self._unknown(kind, tag, at, end)
                continue
            index = counts.get(field.group, 0)
            found = 1
            if tag & 7 == _LENGTH:
                length, at = self._varint(kind, at, end)
                if length > end - at:
                    raise _malformed(kind, "it ends amid a field")
                found = self._value(kind, field, index, at, at + length)
                at += length
                if field.total is not None:
                    size = sizes[field.name] = sizes.get(field.name, 0) + length
                    if size > field.total:
                        problem = f"have {size} bytes together or more; at most {field.total} are accepted"
                        raise LimitError(problem, field.descriptor, size).prepend(field.name)
            elif field.run is not None:
                at = begin
                while matched := field.run.match(self._data, at, end):
                    at = matched.end()
                if at == begin:
                    raise _malformed(kind, "a number has no end")
                found = _num_varints(self._data[begin:at]) // 2
            else:
                at = self._skip(kind, tag & 7, at, end)
            counts[field.group] = index + found
            if index + found > field.count:
                raise self._too_many(kind, field, index + found)

    def _value(self, kind: _Kind, field: _Field, index: int, at: int, end: int) -> int:
        """One value that has a length, or packed numbers. How many values that is."""
        if field.run is not None:
            return _num_varints(self._data[at:end])
        part = f"[{index}]" if field.descriptor.is_repeated else ""
        part = part if kind.is_list else field.name + part
        if field.size is not None and end - at > field.size:
            problem = f"has {end - at} bytes; at most {field.size} are accepted"
            raise LimitError(problem, field.descriptor, end - at).prepend(part)
        if field.inside is not None and index < field.count:
            self._left -= 1
            if self._left < 0:
                raise FieldError(f"holds more than {self._max_messages} messages, the most accepted")
            try:
                self.message(field.inside, at, end)
            except FieldError as error:
                raise error.prepend(part) from None
        return 1

    def _too_many(self, kind: _Kind, field: _Field, found: int) -> FieldError:
        part = "" if kind.is_list else field.name
        if field.descriptor.is_repeated:
            problem = f"has {found} values or more; at most {field.count} are accepted"
            error: FieldError = LimitError(problem, field.descriptor, found)
        elif field.group != field.name:
            error = FieldError("is there beside another of its kind; one is accepted")
        else:
            error = FieldError("is there twice; once is accepted")
        return error.prepend(part) if part else error

    def _unknown(self, kind: _Kind, tag: int, at: int, end: int) -> int:
        number = tag >> 3
        if number == 0 or number in kind.names:
            raise _malformed(kind, f"{kind.names.get(number, 'field 0')} has wire type {tag & 7}")
        if kind.is_strict:
            raise FieldError(
                f"has a field of number {number}, which {kind.name} does not have in the contract of this server; what "
                "is asked for is never left out"
            )
        return self._skip(kind, tag & 7, at, end)

    def _skip(self, kind: _Kind, wire_type: int, at: int, end: int) -> int:
        """The end of a value of no interest."""
        if wire_type == _VARINT:
            return self._varint(kind, at, end)[1]
        if wire_type == _LENGTH:
            length, at = self._varint(kind, at, end)
            at += length
        elif wire_type in _FIXED:
            at += _FIXED[wire_type]
        else:
            raise _malformed(kind, f"wire type {wire_type}")
        if at > end:
            raise _malformed(kind, "it ends amid a field")
        return at

    def _varint(self, kind: _Kind, at: int, end: int) -> tuple[int, int]:
        if at < end and (byte := self._data[at]) < 0x80:
            return byte, at + 1
        found = _ONE_VARINT.match(self._data, at, end)
        if found is None:
            raise _malformed(kind, "a number has no end")
        value = 0
        for byte in reversed(found[0]):
            value = value << 7 | byte & 0x7F
        return value, found.end()


def _num_varints(data: bytes) -> int:
    """As many numbers as there are bytes that end one."""
    return len(data.translate(None, _CONTINUED))


def _to_varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*parts, value))


def _malformed(kind: _Kind, problem: str) -> FieldError:
    return FieldError(f"is no {kind.name}: {problem}")
