"""The text of one row, token by token, and why it ends: what both engines must do alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from steer_server.engine.text import Detokenizer, Piece, StopStrings
from steer_server.types import FinishReason, SamplingParams


@dataclass(eq=False)
class RowText:
    """Turns the tokens of one continuation into text."""

    detokenizer: Detokenizer
    sampling: SamplingParams
    prompt_tokens: int
    context_length: int
    eos_ids: frozenset[int]
    ids: list[int] = field(default_factory=list)
    _stops: StopStrings = field(init=False)

    def __post_init__(self) -> None:
        self._stops = StopStrings(self.sampling.stop_strings)

    def push(self, token: int) -> tuple[Piece, FinishReason | None]:
        """The text that may be shown after this token, and the reason why it is the last one, if it is."""
        self.ids.append(token)
        piece = self._stops.push(self.detokenizer.push(token))
        return piece, FinishReason.STOP_STRING if piece.stop_string else self._reason(token)

    def flush(self) -> str:
        """What was held back, at an end that is not a stop string."""
        return self._stops.push(self.detokenizer.flush()).text + self._stops.flush()

    def _reason(self, token: int) -> FinishReason | None:
        if token in self.sampling.stop_token_ids:
            return FinishReason.STOP_TOKEN
        if token in self.eos_ids and not self.sampling.ignore_eos:
            return FinishReason.EOS
        if len(self.ids) >= self.sampling.max_tokens:
            return FinishReason.MAX_TOKENS
        if self.prompt_tokens + len(self.ids) >= self.context_length:
            return FinishReason.CONTEXT_LIMIT
        return None
