"""Which words two texts have in common."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from steer_client._matching import SPACELESS

# A word with the white space before it; of scripts without spaces, every character.
_WORD = re.compile(rf"\s*[{SPACELESS}]|\s*[^\s{SPACELESS}]+|\s+$")


@dataclass(frozen=True, slots=True)
class Change:
    """A stretch of two texts: in both, in the first alone ("removed") or in the second alone ("added")."""

    kind: Literal["same", "removed", "added"]
    text: str


def word_diff(first: str, second: str) -> tuple[Change, ...]:
    """How `second` differs from `first`: what is same or removed joins to the first, same or added to the second."""
    before, after = _WORD.findall(first), _WORD.findall(second)
    changes = []
    for kind, start, end, from_, to in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal":
            changes.append(Change("same", "".join(before[start:end])))
            continue
        if start < end:
            changes.append(Change("removed", "".join(before[start:end])))
        if from_ < to:
            changes.append(Change("added", "".join(after[from_:to])))
    return tuple(changes)
