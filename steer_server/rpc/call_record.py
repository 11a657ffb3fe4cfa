"""What the log says of one call. Who serves it fills this in: never with a prompt or a text."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from steer_server.tracing.base import NO_TRACE, CallTrace
from steer_server.types import (
    ArmEvent,
    CompareEvent,
    Completion,
    Delta,
    GenerateEvent,
    ScoreEvent,
    Started,
    TextScore,
    Timings,
)

_MAX_OPERATORS = 16


@dataclass
class CallRecord:
    """Filled by the services, as far as their call has come."""

    is_refused: bool = False
    """Refused before anything of it was read: such calls are logged together, by their limit."""
    trace: CallTrace = NO_TRACE
    token: str = ""
    """Its name."""
    request_id: str = ""
    prompts: dict[str, int] = field(default_factory=dict)
    """Tokens, by the id of the prompt: of several one each."""
    generated_tokens: int = 0
    scored_tokens: int = 0
    """Of a text that was given."""
    texts: int = 0
    """Of a comparison, or with several samples, more than one."""
    operators: dict[str, str] = field(default_factory=dict)
    """Digests by name."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the text that ended last."""

    def see(self, event: GenerateEvent | CompareEvent | ScoreEvent) -> None:
        """Takes note of what the client is about to get."""
        self.trace.see(event)
        prompt_id = ""
        if isinstance(event, ArmEvent):
            prompt_id, event = event.prompt_id, event.event
        if isinstance(event, Started):
            self.texts += 1
            self.prompts[prompt_id] = len(event.prompt_token_ids)
            self.operators.update(event.operators)
        elif isinstance(event, Delta):
            self.generated_tokens += len(event.token_ids)
        elif isinstance(event, TextScore):
            self.scored_tokens = len(event.token_ids)
            self._finish(event.timings)
        elif isinstance(event, Completion):
            self._finish(event.timings)

    def _finish(self, timings: Timings) -> None:
        self.seconds = {"queued": timings.queued, "total": timings.total}
        if timings.time_to_first_token is not None:
            self.seconds["first_token"] = timings.time_to_first_token

    def fields(self) -> dict[str, str | int | float]:
        """What is known, by the names in the log."""
        found: dict[str, str | int | float] = {}
        if self.token:
            found["token"] = self.token
        if self.request_id:
            found["request_id"] = self.request_id
        if self.trace.trace_id:
            found["trace_id"] = self.trace.trace_id
        if self.operators:
            named = [f"{name}@{digest}" for name, digest in self.operators.items()]
            more = len(named) - _MAX_OPERATORS
            found["operators"] = " ".join(named[:_MAX_OPERATORS]) + (f" and {more} more" if more > 0 else "")
        if len(self.prompts) > 1:
            found["prompts"] = len(self.prompts)
        if self.prompts:
            found |= {"texts": self.texts, "prompt_tokens": sum(self.prompts.values())}
            found["generated_tokens"] = self.generated_tokens
        if self.scored_tokens:
            found["scored_tokens"] = self.scored_tokens
        return found | {name: round(value, 3) for name, value in self.seconds.items()}


CURRENT: ContextVar[CallRecord] = ContextVar("call record")
"""Of the call that this task serves."""


def current_call() -> CallRecord:
    """The record of the call that is being served; outside of one, a record that nobody reads."""
    found = CURRENT.get(None)
    return CallRecord() if found is None else found
