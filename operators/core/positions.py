"""Which positions of a text an operator pushes.

Positions count the tokens of prompt and continuation together, from 0. A direction a_k is that of the whole text up to
position k, whatever is pushed: restricting the positions restricts where the push is added, not what it is made of.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from operators.core.errors import SettingError

Part = Literal["all", "prompt", "generated"]
_LAST = (1 << 31) - 1
_RANGE = re.compile(r"([0-9]{0,10})\.\.([0-9]{0,10})")
ACCEPTED = "all, first, prompt, generated, a range such as 4.. or 0..8, or a range of a part such as generated:0..5"


@dataclass(frozen=True)
class Positions:
    """The positions of ``part`` from its number ``start`` up to, but not including, its number ``end``.

    ``start`` and ``end`` count from the part's own beginning; ``end`` None means up to the part's end. The part "all"
    is the whole text, so that ``Positions()`` is every position, as published, and ``Positions(end=1)`` the first.
    A :class:`operators.core.apply.Setting` checks them.
    """

    part: Part = field(default="all", metadata={"when_unset": lambda: "all"})
    start: int = 0
    end: int | None = None

    def check(self) -> None:
        """Raises :class:`SettingError` for a part that does not exist, or a range without a position."""
        if self.part not in get_args(Part):
            raise SettingError("positions.part", f"is {self.part!r}; {', '.join(get_args(Part))} are accepted")
        if not 0 <= self.start <= _LAST:
            raise SettingError("positions.start", f"is {self.start}; a number from 0 to {_LAST} is accepted")
        if self.end is not None and not self.start < self.end <= _LAST:
            raise SettingError("positions.end", f"is {self.end}; a number above the start {self.start} is accepted")

    def interval(self, prompt_tokens: int) -> tuple[int, int | None]:
        """[first, end) in positions of the whole text, for a prompt of so many tokens; end None: no bound.

        May be empty: a range of the prompt that begins behind its last token has first >= end.
        """
        offset = prompt_tokens if self.part == "generated" else 0
        end = None if self.end is None else offset + self.end
        if self.part == "prompt":
            end = prompt_tokens if end is None else min(end, prompt_tokens)
        return offset + self.start, end

    def count(self, first: int, end: int, *, prompt_tokens: int) -> int:
        """How many of the positions first, ..., end - 1 of a text are among these."""
        begin, stop = self.interval(prompt_tokens)
        return max(0, (end if stop is None else min(end, stop)) - max(first, begin))

    def among(self, first: int, count: int, *, prompt_tokens: int) -> slice:
        """Which of the positions first, ..., first + count - 1 are among these, as a slice of 0, ..., count - 1.

        An empty one is ``slice(0, 0)``.
        """
        begin, stop = self.interval(prompt_tokens)
        low = max(begin - first, 0)
        high = count if stop is None else min(stop - first, count)
        return slice(low, high) if low < high else slice(0, 0)

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Reads what :meth:`__str__` writes. Raises :class:`SettingError` naming the accepted forms."""
        if text == "first":
            return cls(end=1)
        part, colon, numbers = text.rpartition(":") if ":" in text else ("all", "", text)
        if not colon and text in get_args(Part):
            return cls(cast("Part", text))
        found = _RANGE.fullmatch(numbers)
        if found is None or part not in get_args(Part):
            raise SettingError("positions", f"is {text!r}; accepted: {ACCEPTED}")
        positions = cls(cast("Part", part), int(found[1] or 0), int(found[2]) if found[2] else None)
        positions.check()
        return positions

    def __str__(self) -> str:
        """``"all"``, ``"first"``, ``"generated:0..5"``: what :meth:`parse` reads."""
        if self == Positions(end=1):
            return "first"
        if (self.start, self.end) == (0, None):
            return self.part
        numbers = f"{self.start or ''}..{'' if self.end is None else self.end}"
        return numbers if self.part == "all" else f"{self.part}:{numbers}"


ALL_POSITIONS = Positions()
