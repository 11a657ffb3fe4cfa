"""Which positions of a text an operator pushes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, cast, get_args

#: A part of a text: prompt and continuation, the prompt alone, or what was generated.
Part: TypeAlias = Literal["all", "prompt", "generated"]

_RANGE: Final = re.compile(r"([0-9]{0,10})\.\.([0-9]{0,10})")
_FORMS: Final = "all, first, prompt, generated, a range such as 4.. or 0..8, or one of a part such as generated:0..5"


@dataclass(frozen=True, slots=True)
class Positions:
    """Which positions of a text an operator pushes: numbers `start` up to, but not including, `end` of a `part`.

    The numbers count from the beginning of the part; an `end` of None is that of the part. So `Positions()` is every
    position, and `Positions(end=1)` the first token alone. The server judges the values.
    """

    part: Part = field(default="all", metadata={"when_unset": lambda: "all"})
    start: int = 0
    end: int | None = None

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Reads `all`, `first`, `prompt`, `generated`, a range `4..`, `0..8`, or one of a part, `generated:0..5`.

        Raises ValueError, naming the text and the accepted forms, for anything else.
        """
        if text == "first":
            return cls(end=1)
        part, colon, numbers = text.rpartition(":") if ":" in text else ("all", "", text)
        parts = get_args(Part)
        if not colon and text in parts:
            return cls(cast("Part", text))
        found = _RANGE.fullmatch(numbers)
        if found is None or part not in parts:
            raise ValueError(f"cannot read the positions {text!r}: write {_FORMS}")
        start, end = int(found[1] or 0), int(found[2]) if found[2] else None
        if end is not None and end <= start:
            raise ValueError(f"cannot read the positions {text!r}: the end {end} is not above the start {start}")
        return cls(cast("Part", part), start, end)

    def count(self, first: int, end: int, *, prompt_tokens: int) -> int:
        """How many of the positions `first`, ..., `end` - 1 of a text with so long a prompt are among these."""
        offset = prompt_tokens if self.part == "generated" else 0
        stop = end if self.end is None else min(end, offset + self.end)
        if self.part == "prompt":
            stop = min(stop, prompt_tokens)
        return max(0, stop - max(first, offset + self.start))

    def __str__(self) -> str:
        """What `parse` reads."""
        if self == Positions(end=1):
            return "first"
        if (self.start, self.end) == (0, None):
            return self.part
        numbers = f"{self.start or ''}..{'' if self.end is None else self.end}"
        return numbers if self.part == "all" else f"{self.part}:{numbers}"


#: Every position of a text.
ALL_POSITIONS: Final = Positions()
