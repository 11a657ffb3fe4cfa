"""Requests of every method that are many, huge, extreme or malformed in any field, made from the descriptors alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from steering.v1 import generation_pb2, operator_admin_pb2, operators_pb2

FILES = (generation_pb2, operators_pb2, operator_admin_pb2, health_pb2, reflection_pb2)
METHODS: tuple[MethodDescriptor, ...] = tuple(
    method for file in FILES for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods
)
_TEXTS = (
    "",
    "x",
    "the bay",
    "\0",
    "\u0301" * 65,
    "東" * 129,
    "normal",
    "../golden",
    "<end>",
    "a\nb",
    "first",
    "🌉" * 1100,
)
_DOUBLES = (0.0, -0.0, 0.5, -0.5, 1.0, 1e-9, 5e-324, 1e308, -1e308, math.inf, -math.inf, math.nan, 2.0, 3.0)
_INTEGERS = (0, 1, -1, 2, 5, 64, 65, 127, 128, 4096, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 2**64 - 1)
_COUNTS = (0, 1, 2, 3, 17, 65, 200, 1025)
_MANY = (3_000, 20_000)
_MOST = 2_000_000
"""Characters of one list together."""
_SIZES = (129, 2_000, 70_000, 1_500_000)
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


class Fuzz:
    """An endless supply of raw requests, the same for the same seed."""

    def __init__(self, seed: int, operators: tuple[str, ...]) -> None:
        """``operators``: names that the server knows."""
        self._random = random.Random(seed)
        self._operators = operators

    def __iter__(self) -> Iterator[tuple[MethodDescriptor, bytes]]:
        while True:
            # Most methods take nothing: those with much to be wrong come more often.
            method = self._random.choices(METHODS, [1 + 3 * bool(each.input_type.fields) for each in METHODS])[0]
            yield method, self._request(method)

    def _request(self, method: MethodDescriptor) -> bytes:
        message = self._valid(method)
        for _ in range(self._random.choice((0, 1, 1, 1, 2, 4))):
            self._spoil(message)
        data = message.SerializeToString()
        if self._random.random() < 0.3:
            data = self._random.choice(_MUTATIONS)(self._random, data)
        return data

    def _valid(self, method: MethodDescriptor) -> Message:
        """A small request that is in order, and quickly served."""
        message: Any = GetMessageClass(method.input_type)()
        names = {field.name for field in method.input_type.fields}
        if "prompt" in names:
            message.prompt.text = self._random.choice(("the bay", "a b c d", "x"))
            if self._random.random() < 0.2:
                message.prompt.chat.messages.add(role="user", content="hello")
        if "sampling" in names:
            message.sampling.max_tokens = self._random.choice((1, 2, 4))
        if "operators" in names and self._random.random() < 0.7:
            message.operators.add(name=self._operator(), strength=0.5)
        if "arms" in names:
            message.arms.add(name="a").operators.add(name=self._operator(), strength=0.5)
        if names == {"name"}:
            message.name = self._operator()
        return message

    def _operator(self) -> str:
        return self._random.choice((*self._operators, *self._operators, "nothing"))

    def _spoil(self, message: Any) -> None:
        """Changes one field of the message, or of one inside it."""
        while True:
            fields = message.DESCRIPTOR.fields
            if not fields:
                return
            field = self._random.choice(fields)
            if field.message_type is None or self._random.random() < 0.3:
                break
            if field.is_repeated:
                values = getattr(message, field.name)
                message = values[self._random.randrange(len(values))] if values else values.add()
            else:
                message = getattr(message, field.name)
                message.SetInParent()
        if not field.is_repeated:
            self._set(message, field)
            return
        count = self._random.choice(_MANY if self._random.random() < 0.15 else _COUNTS)
        values = getattr(message, field.name)
        del values[:]
        if field.message_type is None:
            value = self._scalar(field)
            size = len(value) if isinstance(value, str | bytes) else 1
            values.extend([value] * min(count, _MOST // max(1, size)))
        else:
            values.extend([GetMessageClass(field.message_type)()] * min(count, 5_000))

    def _set(self, message: Any, field: FieldDescriptor) -> None:
        if field.message_type is not None:
            getattr(message, field.name).SetInParent()
        else:
            setattr(message, field.name, self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> Any:
        pick = self._random.choice
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            text = pick(_TEXTS) if self._random.random() < 0.85 else pick("x é東\n") * pick(_SIZES)
            return text if field.type == FieldDescriptor.TYPE_STRING else text.encode()
        if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
            return pick(_DOUBLES)
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return pick((True, False))
        if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            return pick((0, 1, 2, 3, 9, -1, 2**31 - 1))
        low, high = _RANGES[field.cpp_type]
        return pick([value for value in _INTEGERS if low <= value <= high])


def _flip(source: random.Random, data: bytes) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(source.choice((1, 2, 8))):
        changed[source.randrange(len(changed))] = source.randrange(256)
    return bytes(changed)


def _nested(source: random.Random, data: bytes) -> bytes:
    """Lengths inside lengths, deeper than any message."""
    inside = b""
    for _ in range(source.choice((5, 120, 2000))):
        size = len(inside)
        inside = bytes((0x12, size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14)) + inside
    return data + inside


_MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip,
    _flip,
    _nested,
    lambda source, data: data[: source.randrange(len(data) + 1)],
    lambda source, data: data + source.randbytes(source.choice((1, 3, 40, 3000))),
    # All fields twice, those of a oneof too.
    lambda _source, data: data + data,
    # Fields that no message has, and groups.
    lambda source, data: (
        data + source.choice((b"\xf8\x3f\x01", b"\xfa\x3f\x01a", b"\xfb\x3f\xfc\x3f", b"\xfb\x3f" * 200))
    ),
    # Empty messages, as many as a megabyte or two hold.
    lambda source, data: data + bytes((source.randrange(1, 12) << 3 | 2, 0)) * source.choice((2_000, 1_000_000)),
    lambda source, data: data + bytes((source.randrange(1, 12) << 3, 1)) * source.choice((2_000, 1_000_000)),
    lambda _source, data: data.replace(b"the bay", b"the\xff\xfeay"),
    lambda source, data: source.randbytes(source.choice((1, 20, 500))),
    lambda source, data: b"\x80" * source.choice((1, 11, 100_000)),
)
