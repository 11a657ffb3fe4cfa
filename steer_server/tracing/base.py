"""What follows a call while it is served; without traces, what does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from steer_server.types import CompareEvent, CompareRequest, GenerateEvent, GenerationRequest, ScoreEvent, ScoreRequest

Headers = Iterable[tuple[str, str | bytes]]
"""Of a call, by their names in lower case: gRPC's metadata, or HTTP's head."""
Attribute = str | int | float | bool | tuple[str, ...] | tuple[float, ...] | tuple[int, ...]


@dataclass(frozen=True)
class Ending:
    """How a call ended. Filled by the door that it came by: never with what the client sent."""

    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    """The status, as the protocol names it."""
    error_type: str = ""
    """The stable name of what went wrong; empty where nothing did."""
    problem: str = ""
    is_fault: bool = False
    """Whether it went wrong by the server's fault."""


class CallTrace(Protocol):
    """The trace of one call."""

    @property
    def trace_id(self) -> str:
        """In hexadecimal; empty where nothing is recorded."""

    def asked(self, request: GenerationRequest | CompareRequest | ScoreRequest) -> None:
        """Takes note of what is asked for, before the first event."""

    def see(self, event: GenerateEvent | CompareEvent | ScoreEvent) -> None:
        """Takes note of what the client is about to get."""

    def end(self, ending: Ending) -> None:
        """The call has ended. Nothing more is noted."""


class Tracing(Protocol):
    """Begins the traces of one server."""

    def begin(self, name: str, attributes: Mapping[str, Attribute], headers: Callable[[], Headers]) -> CallTrace:
        """The trace of a call that begins now, in the context that its headers name."""

    async def close(self, seconds: float) -> None:
        """Sends what has not been sent, for so long at most."""


class _Untraced:
    """Implements both and does nothing."""

    trace_id = ""

    def begin(self, name: str, attributes: Mapping[str, Attribute], headers: Callable[[], Headers]) -> CallTrace:
        """Itself."""
        del name, attributes, headers
        return self

    def asked(self, request: GenerationRequest | CompareRequest | ScoreRequest) -> None:
        """Nothing."""

    def see(self, event: GenerateEvent | CompareEvent | ScoreEvent) -> None:
        """Nothing."""

    def end(self, ending: Ending) -> None:
        """Nothing."""

    async def close(self, seconds: float) -> None:
        """Nothing."""


NO_TRACING: Tracing = _Untraced()
NO_TRACE: CallTrace = _Untraced()
