"""What reading and writing share: the error that knows its path, and values field by field."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import NoneType
from typing import Any, TypeAlias, get_args, get_origin

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

Convert: TypeAlias = Callable[[Any], Any]
WHEN_UNSET = "when_unset"
"""Key of a dataclass field's metadata: a function that makes the value of a field that the message leaves unset."""


class FieldError(ValueError):
    """A value that the other side has no counterpart for."""

    def __init__(self, problem: str, *, number: int | None = None) -> None:
        """``number``: of an unknown value of an enum; None for every other problem."""
        super().__init__(problem)
        self.problem, self.number = problem, number
        self.path = ""
        """From the message that was converted to the field, such as "operators[1].rule"."""
        self.message: Message | None = None
        """The message that has the field, where one was read."""

    def prepend(self, part: str, message: Message | None = None) -> FieldError:
        """This error, ``part`` put before its path: nested messages complete it on the way out."""
        self.path = part + ("." if self.path and not self.path.startswith("[") else "") + self.path
        self.message = message if self.message is None else self.message
        return self


def without_none(hint: Any) -> tuple[Any, bool]:
    """A type without None, and whether it admitted None."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return (kinds[0], True) if NoneType in get_args(hint) else (hint, False)


def is_sequence(hint: Any) -> bool:
    """Whether a type is that of a repeated field."""
    return get_origin(hint) in (tuple, Sequence)


def item_type(hint: Any) -> Any:
    """The type of one value of a repeated field. Of a union it is the sequence's: ``accept`` makes one of the rest."""
    return next(get_args(kind)[0] for kind in (hint, *get_args(hint)) if is_sequence(kind))


def enum_numbers(enum: EnumDescriptor) -> dict[str, int]:
    """By what follows the prefix, in lower case; without 0, which stands for unset."""
    prefix = "".join(f"_{letter}" if letter.isupper() else letter for letter in enum.name).strip("_").upper() + "_"
    return {value.name.removeprefix(prefix).lower(): value.number for value in enum.values if value.number}


def items(convert: Convert) -> Callable[[Collection[Any]], list[Any]]:
    """What converts every value of a repeated field, and names the one at fault by its index."""

    def converted(values: Collection[Any]) -> list[Any]:
        done: list[Any] = []
        if not values:
            return done
        try:
            # What was converted before an error stays in the list.
            done.extend(map(convert, values))
        except FieldError as error:
            raise error.prepend(f"[{len(done)}]") from None
        return done

    return converted
