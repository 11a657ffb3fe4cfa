"""When an operator was built, as its header says."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from operators.core.errors import OperatorError

_VARIABLE = "SOURCE_DATE_EPOCH"


def built_at() -> datetime:
    """Now, to the second; or ``SOURCE_DATE_EPOCH`` (seconds since 1970), with which two builds have one digest.

    Raises:
        OperatorError: the variable is something else.
    """
    given = os.environ.get(_VARIABLE)
    if not given:
        return datetime.now(UTC).replace(microsecond=0)
    try:
        if not (given.isascii() and given.isdecimal()):
            raise ValueError
        return datetime.fromtimestamp(int(given), UTC)
    except (ValueError, OverflowError, OSError):
        raise OperatorError(f"{_VARIABLE} is {given!r}; whole seconds since 1970 are accepted") from None
