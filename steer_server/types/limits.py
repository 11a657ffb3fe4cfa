"""What a request's fields accept, declared beside each: ``top_p: Annotated[float, Range(above=0.0, maximum=1.0)]``.

A request checks itself, and the parts that do not check themselves, with :func:`check_fields` when it is made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Protocol, get_args, get_type_hints, runtime_checkable

from steer_server.errors import InvalidRequestError


@runtime_checkable
class Limit(Protocol):
    """What the value of a field must be. None, a value that was not given, is always accepted."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, and what is accepted; None where nothing is wrong."""


@dataclass(frozen=True)
class Range:
    """A number of ``minimum`` or more, or above ``above``, and at most ``maximum``, without which it must be finite."""

    minimum: float = -math.inf
    maximum: float = math.inf
    above: float = -math.inf
    accepted: str = ""
    """The range in words, where they say more than its numbers."""

    def problem(self, value: float) -> str | None:
        """See :class:`Limit`. The comparison is written so that NaN fails it."""
        if value >= self.minimum and value > self.above and value <= self.maximum and value < math.inf:
            return None
        return f"is {value}; accepted: {self.accepted or self._in_words()}"

    def _in_words(self) -> str:
        integer = isinstance(self.minimum, int)
        if self.above > -math.inf and self.maximum < math.inf:
            return f"a number above {self.above:g}, at most {self.maximum:g}"
        if self.above > -math.inf:
            return f"a finite number above {self.above:g}"
        if self.maximum == math.inf:
            return f"{'' if integer else 'a finite number of '}{self.minimum:g} or more"
        return f"{'' if integer else 'a number from '}{self.minimum:g} to {self.maximum:g}"


@dataclass(frozen=True)
class Bounded:
    """At most so many items, and so many characters in a text, be it the value or one of its items."""

    max_characters: int | None = None
    min_characters: int = 0
    max_items: int | None = None
    items: str = "items"
    """What the items are, in words."""

    def problem(self, value: str | tuple[object, ...]) -> str | None:
        """See :class:`Limit`."""
        items = (value,) if isinstance(value, str) else value
        sizes = [len(item) for item in items if isinstance(item, str)]
        longest = math.inf if self.max_characters is None else self.max_characters
        fits = all(self.min_characters <= size <= longest for size in sizes)
        if fits and (self.max_items is None or len(items) <= self.max_items):
            return None
        if isinstance(value, str):
            return f"has {len(value)} characters; at most {self.max_characters} are accepted"
        texts = f" of {sizes[:4]} characters" if sizes else ""
        accepted = f"at most {self.max_items}"
        if self.max_characters is not None:
            accepted += f", of {self.min_characters} to {self.max_characters} characters"
        return f"is {len(items)} {self.items}{texts}; accepted: {accepted}"


@dataclass(frozen=True)
class Digest:
    """A sha256 as files and receipts have it."""

    def problem(self, value: str) -> str | None:
        """See :class:`Limit`."""
        if re.fullmatch(r"sha256:[0-9a-f]{64}", value):
            return None
        return f"is {value[:80]!r}; accepted: sha256: and all 64 of its digits, 0-9 a-f, as receipts have them"


@dataclass(frozen=True)
class NotEmpty:
    """At least one item, or character."""

    reason: str
    """Why an empty value is not accepted, in words."""

    def problem(self, value: str | tuple[object, ...]) -> str | None:
        """See :class:`Limit`."""
        return None if value else f"is empty; {self.reason}"


@runtime_checkable
class Tied(Protocol):
    """A part of a request whose fields are not accepted in every combination."""

    def check_ties(self, path: str) -> None:
        """Raises :class:`InvalidRequestError`, which names a field from ``path`` on; each has been checked alone."""


def check_fields(instance: Any, path: str = "") -> None:
    """Raises :class:`InvalidRequestError`, which names the field from ``path`` on, for the first value not accepted.

    Parts are checked with the whole, which knows where they stand, but for those that check themselves when they are
    made.
    """
    for name, limits, has_parts in _checked_fields(instance.__class__):
        value, place = getattr(instance, name), f"{path}.{name}" if path else name
        if value is None:
            continue
        for limit in limits:
            problem = limit.problem(value)
            if problem is not None:
                raise InvalidRequestError(place, problem)
        if has_parts and isinstance(value, tuple):
            for index, part in enumerate(value):
                check_fields(part, f"{place}[{index}]")
        elif has_parts:
            check_fields(value, place)
    if _is_tied(instance.__class__):
        instance.check_ties(path)


def check_unique(values: Iterable[object], path: str, name: str) -> None:
    """Raises :class:`InvalidRequestError` for the first item of ``path`` whose ``name`` another one before it has."""
    seen: dict[object, int] = {}
    for index, value in enumerate(values):
        first = seen.setdefault(value, index)
        if first != index:
            raise InvalidRequestError(f"{path}[{index}].{name}", f"is {value!r}, as of {path}[{first}]; accepted: once")


@cache
def _is_tied(cls: type) -> bool:
    """Whether a class is :class:`Tied`. Once: to look at a protocol takes longer than all else in a request's check."""
    return issubclass(cls, Tied)


@cache
def _checked_fields(cls: type) -> tuple[tuple[str, tuple[Limit, ...], bool], ...]:
    """The fields of a class that have something to check: name, limits, and whether its value or items have limits.

    Decided by types, once: the items of a million token ids are not looked at one by one.
    """
    hints = get_type_hints(cls, include_extras=True)
    checked = []
    for each in fields(cls):
        hint = hints[each.name]
        limits = tuple(limit for limit in getattr(hint, "__metadata__", ()) if isinstance(limit, Limit))
        has_parts = any(not hasattr(part, "__post_init__") for part in _dataclasses_in(hint))
        if limits or has_parts:
            checked.append((each.name, limits, has_parts))
    return tuple(checked)


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for argument in get_args(hint):
        yield from _dataclasses_in(argument)
