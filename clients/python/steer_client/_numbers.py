"""Numbers that a person wrote: Python's own readers also take 0_4 for 4, other scripts' digits, nan and infinity."""

from __future__ import annotations

import math
import re

_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"[+-]?[0-9]+")


def read_decimal(text: str) -> float:
    """A number as it is written in JSON or on paper: 0.4, .4, -5, 1e-3. Raises ValueError for anything else."""
    value = float(text) if _DECIMAL.fullmatch(text.strip(" ")) else math.inf
    # Digits of more than a double holds would be infinity.
    if math.isinf(value):
        raise ValueError(text)
    return value


def read_whole(text: str) -> int:
    """A whole number in decimal digits. Raises ValueError for anything else."""
    if not _WHOLE.fullmatch(text.strip(" ")):
        raise ValueError(text)
    return int(text)
