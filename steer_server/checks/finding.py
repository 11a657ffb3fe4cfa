"""What a check of a configuration found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from steer_server.config import ServerConfig


@dataclass(frozen=True)
class Finding:
    """One line. A ``problem`` keeps the server from starting, or an operator from being used; a ``note`` does not."""

    kind: Literal["ok", "note", "problem"]
    check: str
    """What was looked at, in one word."""
    said: str

    def __str__(self) -> str:
        return f"{self.kind:<8} {self.check}: {' '.join(self.said.split())}"


Check = Callable[[ServerConfig], Iterable[Finding]]
