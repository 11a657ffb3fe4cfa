"""The text of one row, token by token, and why it ends. Shared by the engines, so that both end texts alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from steer_server.engine.text import Detokenizer, Piece, StopStrings
from steer_server.types import FinishReason, SamplingParams


@dataclass(eq=False)
class RowText:
    """The text of one continuation. ``ids``: its tokens so far, without the prompt.

    ``special_stops``: of :func:`~steer_server.engine.special_stops.special_stops`.
    """

    detokenizer: Detokenizer
    sampling: SamplingParams
    prompt_tokens: int
    context_length: int
    eos_ids: frozenset[int]
    special_stops: Mapping[int, str] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    _stops: StopStrings = field(init=False)

    def __post_init__(self) -> None:
        self._stops = StopStrings(self.sampling.stop_strings)

    @property
    def ending_ids(self) -> frozenset[int]:
        """Every token that ends the text: none of them may be chosen before ``min_tokens``."""
        eos = frozenset() if self.sampling.ignore_eos else self.eos_ids
        return eos.union(self.sampling.stop_token_ids, self.special_stops)

    def push(self, token: int) -> tuple[Piece, FinishReason | None]:
        """Adds a token: the text that may be shown now, and why the continuation ends with it (None: it goes on)."""
        self.ids.append(token)
        piece = self._stops.push(self.detokenizer.push(token), may_end=len(self.ids) > self.sampling.min_tokens)
        if piece.stop_string:
            return piece, FinishReason.STOP_STRING
        if token in self.special_stops:
            # What is held back is no stop string any more: the text ends here.
            return Piece(piece.text + self.flush(), self.special_stops[token]), FinishReason.STOP_STRING
        return piece, self._reason(token)

    def flush(self) -> str:
        """The text still held back, once the continuation has ended otherwise than by a stop string.

        No stop string is looked for in it: that would cut the text, and nothing would say why it ended.
        """
        return self._stops.flush() + self.detokenizer.flush()

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
