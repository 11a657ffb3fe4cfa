"""The texts of one call as they end: when each waited, was read and was decoded, and what steered it. No OpenTelemetry.

All that is kept of a text that has not ended is bounded, however long it grows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from steer_server.tracing import names
from steer_server.tracing.base import Attribute
from steer_server.types import (
    NORMAL,
    ArmEvent,
    ArmSampling,
    CompareEvent,
    CompareRequest,
    Completion,
    Delta,
    GenerateEvent,
    GenerationRequest,
    Prompt,
    Receipt,
    ScoreEvent,
    ScoreRequest,
    Started,
    TextScore,
    Timings,
)

CHAT, TEXT, SCORE = "chat", "text_completion", "score"
_MAX_INT = 2**63 - 1
"""Of an attribute; a seed may be larger."""
_Key = tuple[str, str, int]
"""Prompt, arm and sample."""


@dataclass(frozen=True)
class TracedText:
    """A text that has ended. Times are seconds of the monotonic clock."""

    operation: str
    attributes: Mapping[str, Attribute]
    timings: Timings | None
    """None of one that was not finished."""


@dataclass
class _Open:
    """A text that has begun."""

    prompt_tokens: int
    operators: tuple[tuple[str, str], ...]
    sample: int
    tokens: int = 0


class CallTexts:
    """Follows the events of one call."""

    def __init__(self) -> None:
        self.count = 0
        """Texts that have begun."""
        self._operation = TEXT
        self._sampling: dict[str, ArmSampling] = {}
        """By arm."""
        self._open: dict[_Key, _Open] = {}

    def asked(self, request: GenerationRequest | CompareRequest | ScoreRequest) -> None:
        """Takes note of how the texts are to be sampled."""
        if isinstance(request, ScoreRequest):
            self._operation = SCORE
            return
        prompts: Sequence[Prompt | None] = [request.prompt]
        self._sampling = {"": request.sampling}
        if isinstance(request, CompareRequest):
            prompts = [request.prompt, *(each.prompt for each in request.prompts)]
            self._sampling = {NORMAL: request.sampling}
            self._sampling |= {arm.name: arm.sampling or request.sampling for arm in request.arms}
        if any(prompt is not None and prompt.chat is not None for prompt in prompts):
            self._operation = CHAT

    def see(self, event: GenerateEvent | CompareEvent | ScoreEvent) -> Iterator[TracedText]:
        """The texts that end with this event."""
        prompt = arm = ""
        if isinstance(event, ArmEvent):
            prompt, arm, event = event.prompt_id, event.arm, event.event
        if isinstance(event, Started):
            self.count += 1
            text = _Open(len(event.prompt_token_ids), event.operators, event.sample)
            self._open[prompt, arm, event.sample] = text
        elif isinstance(event, Delta):
            self._open[prompt, arm, event.sample].tokens += len(event.token_ids)
        elif isinstance(event, Completion):
            yield self._finished(arm, self._open.pop((prompt, arm, event.sample)), event)
        elif isinstance(event, TextScore):
            for scored in event.arms:
                text = self._open.pop(("", scored.arm, 0))
                tokens = text.prompt_tokens + len(event.token_ids)
                yield TracedText(
                    SCORE,
                    {names.GEN_AI_INPUT_TOKENS: tokens, names.GEN_AI_OUTPUT_TOKENS: 0, **_steering(scored.receipts)},
                    event.timings,
                )

    def unfinished(self) -> Iterator[TracedText]:
        """The texts that have begun and not ended, once the call has."""
        for text in self._open.values():
            attributes: dict[str, Attribute] = _usage(text, text.tokens)
            if text.operators:
                attributes[names.OPERATORS] = tuple(name for name, _ in text.operators)
                attributes[names.DIGESTS] = tuple(digest for _, digest in text.operators)
            yield TracedText(self._operation, attributes, None)
        self._open.clear()

    def _finished(self, arm: str, text: _Open, end: Completion) -> TracedText:
        attributes = _usage(text, end.usage.completion_tokens) | _steering(end.receipts)
        attributes[names.GEN_AI_FINISH_REASONS] = (end.finish_reason.value,)
        if end.seed <= _MAX_INT:
            attributes[names.GEN_AI_REQUEST_SEED] = end.seed
        if end.timings.time_to_first_token is not None:
            attributes[names.GEN_AI_FIRST_TOKEN] = end.timings.time_to_first_token
        sampling = self._sampling.get(arm)
        if sampling is not None:
            attributes |= {
                names.GEN_AI_REQUEST_MAX_TOKENS: sampling.max_tokens,
                names.GEN_AI_REQUEST_TEMPERATURE: sampling.temperature,
                names.GEN_AI_REQUEST_TOP_P: sampling.top_p,
                names.GEN_AI_REQUEST_TOP_K: sampling.top_k,
            }
        return TracedText(self._operation, attributes, end.timings)


def _usage(text: _Open, generated: int) -> dict[str, Attribute]:
    return {
        names.GEN_AI_INPUT_TOKENS: text.prompt_tokens,
        names.GEN_AI_OUTPUT_TOKENS: generated,
        names.SAMPLE: text.sample,
    }


def _steering(receipts: Sequence[Receipt]) -> dict[str, Attribute]:
    if not receipts:
        return {}
    return {
        names.OPERATORS: tuple(each.operator for each in receipts),
        names.DIGESTS: tuple(each.digest for each in receipts),
        names.STRENGTHS: tuple(float(each.strength) for each in receipts),
        names.LAYERS: tuple(each.layer for each in receipts),
        names.POSITIONS: tuple(each.prompt_tokens_steered + each.generated_tokens_steered for each in receipts),
    }
