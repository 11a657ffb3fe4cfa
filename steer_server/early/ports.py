"""What the process is told on its command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

OPEN = "open"
"""What the process prints when it listens."""


@dataclass(frozen=True)
class EarlyPorts:
    """What the process is to listen on: addresses HOST:PORT. Filled by ``early.holding``."""

    grpc: tuple[str, ...]
    http: tuple[tuple[str, bool], ...]
    """Each with whether it is the door, which has TLS and a page for people; the other is that of metrics."""
    services: tuple[str, ...]
    """The names that the health service knows."""
    certificates: tuple[str, ...]
    """Files: certificate, key and, where clients must show one, their authority."""

    @classmethod
    def from_json(cls, text: str) -> EarlyPorts:
        """Of what :meth:`to_json` gave."""
        fields: dict[str, Any] = json.loads(text)
        fields["http"] = [tuple(each) for each in fields["http"]]
        return cls(**{name: tuple(each) for name, each in fields.items()})

    def to_json(self) -> str:
        """For the command line of the process."""
        return json.dumps(asdict(self))
