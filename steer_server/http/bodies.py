"""JSON as it comes in: measured as bytes, and parsed only where it holds no more than a request may.

Stricter than JSON parsers are: a name that comes twice, NaN and half a surrogate pair are refused, so that nothing that
was sent is dropped or means something else.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from steer_server.errors import InvalidRequestError, QueueFullError
from steer_server.types import RequestLimits

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TEXT = re.compile(rb'"[^"]*"?')
"""Of what has no escapes any more. One without an end has all that is left."""
_LONG_NUMBER = re.compile(rb"(?<![0-9.])[0-9]{309}")
"""Of as many digits as the largest double."""
_BRACKET = re.compile(rb"[][{}]")
_MAX_DEPTH = 32
"""Requests have less than ten."""
_ESCAPED = 3
"""Times that a text may be longer as JSON: where every character is written as ``\\u2603``, but for those of ASCII."""
_VALUES_OF_A_MESSAGE = 16
_OBJECTS_OF_A_MESSAGE = 4
"""A turn of a chat may be in several parts."""
_IDS_OF_PROMPTS = 1 << 18
"""Token ids of several prompts together: ten megabytes, once they are parsed."""
_LEAST_ROOM = 256 << 20
_LARGEST_AT_ONCE = 8


@dataclass(frozen=True)
class BodyLimits:
    """Of one body."""

    max_bytes: int
    max_values: int
    """Items and members, at all depths together."""
    max_objects: int

    @classmethod
    def of(cls, limits: RequestLimits, context_length: int) -> BodyLimits:
        """What the largest request of the contract takes as JSON; fewer token ids, where several prompts have them."""
        values = max(context_length, _IDS_OF_PROMPTS) + limits.max_messages * _VALUES_OF_A_MESSAGE
        return cls(_ESCAPED * limits.max_request_bytes, values, _OBJECTS_OF_A_MESSAGE * limits.max_messages)


class BodyRoom:
    """What all bodies together may hold until they are read: a thousand of the largest would take gigabytes."""

    def __init__(self, limits: BodyLimits) -> None:
        self.left = max(_LEAST_ROOM, _LARGEST_AT_ONCE * limits.max_bytes)
        """Bytes."""

    @contextmanager
    def held(self) -> Iterator[HeldRoom]:
        """What one body takes until it is gone, or has become a request."""
        mine = HeldRoom(self)
        try:
            yield mine
        finally:
            self.left += mine.size


class HeldRoom:
    """What one body takes of the room."""

    def __init__(self, room: BodyRoom) -> None:
        self._room, self.size = room, 0

    def take(self, size: int) -> None:
        """Raises :class:`QueueFullError` where there is not so much left."""
        if size > self._room.left:
            raise QueueFullError("the bodies of other requests, which come just now, take all the room there is", 1.0)
        self._room.left -= size
        self.size += size


def read_object(data: bytes, limits: BodyLimits) -> dict[str, Any]:
    """The JSON object in these bytes. Raises :class:`InvalidRequestError`, which names the body as "request"."""
    _check_size(data, limits)
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_members,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except _ProblemError as error:
        raise InvalidRequestError("request", str(error)) from None
    except UnicodeDecodeError:
        raise InvalidRequestError("request", "is not UTF-8") from None
    except UnicodeEncodeError:
        raise InvalidRequestError("request", "has half of a surrogate pair, which is no character") from None
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise InvalidRequestError("request", problem) from None
    if not isinstance(value, dict):
        raise InvalidRequestError("request", "is JSON, and no object; an object is accepted")
    return value


class _ProblemError(Exception):
    """What is wrong with a value, in words."""


def _check_size(data: bytes, limits: BodyLimits) -> None:
    outside = _outside_texts(data, limits)
    kinds = ((limits.max_values, b",[{", "values"), (limits.max_objects, b"{", "objects"))
    # As many ends as beginnings, or it is no JSON.
    for most, signs, kind in (*kinds, (limits.max_values, b"]}", "ends of values")):
        found = sum(map(outside.count, signs))
        if found > most:
            raise InvalidRequestError("request", f"has {found} {kind} or more; at most {most} are accepted")
    depth = 0
    for bracket in _BRACKET.findall(outside):
        depth += 1 if bracket in b"[{" else -1
        if depth > _MAX_DEPTH:
            raise InvalidRequestError("request", f"is nested more than {_MAX_DEPTH} deep")
    if _LONG_NUMBER.search(outside):
        raise InvalidRequestError("request", "has a number of too many digits")


def _outside_texts(data: bytes, limits: BodyLimits) -> bytes:
    """What is no text, be it a value or the name of a member. Ends at the first text that is one too many."""
    pieces, at = [], 0
    # Of escapes those that matter to where a text ends. Pairs go first, so that no half of one is taken for a whole.
    # No JSON has a backslash outside of a text: what follows one is never parsed, however it is read here.
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    for count, text in enumerate(_TEXT.finditer(data)):
        if count > 2 * limits.max_values:
            raise InvalidRequestError("request", f"has {count} texts or more; at most {count - 1} are accepted")
        pieces.append(data[at : text.start()])
        at = text.end()
    return b"".join((*pieces, data[at:]))


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise _ProblemError(f"has {twice[:64]!r} twice in one object")
    return members


def _refuse_constant(text: str) -> float:
    raise _ProblemError(f"has {text}, which is no number of JSON")


def _whole(text: str) -> int:
    # As the parser does it by itself, but that other threads may go on in between.
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _ProblemError(f"has {text[:32]}, which is more than a double holds")
    return value
