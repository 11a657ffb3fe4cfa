"""What a call uses where the caller gives nothing. Imports nothing heavy: the command's help needs it too."""

from __future__ import annotations

from enum import Enum
from typing import Final, Literal, TypeAlias

DEFAULT_TARGET: Final = "127.0.0.1:50051"
#: In seconds, for a whole call.
DEFAULT_TIMEOUT: Final = 120.0
#: The name of the plain arm of every comparison.
NORMAL: Final = "normal"
#: The name of the arm that a comparison makes of `operators`.
STEERED: Final = "steered"


class Default(Enum):
    """Stands for the client's own timeout, because None means no timeout."""

    TIMEOUT = "the client's timeout"


CLIENT_TIMEOUT: Final = Default.TIMEOUT
#: What the health of a server is asked for.
Probe: TypeAlias = Literal["ready", "started", "live"]
Timeout: TypeAlias = float | Literal[Default.TIMEOUT] | None
