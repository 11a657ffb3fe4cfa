"""From token ids to text, a piece at a time: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream

_UNREADABLE = "\ufffd"
_MAX_UNREADABLE_TOKENS = 16
"""Tokens at the end of a prompt that are looked through for a whole character; one character has at most four."""
_PRIMING = (64, 65, 66, 67, 1024, 1025, 1026, 1027)
"""Tokens of a prompt's end to try, in fours because one in four begins where a character of bytes does."""
_MOST_PRIMING = 4096


class Detokenizer:
    """Incremental decoding of one continuation.

    Pieces are cut so that no character is split. The stream is primed with the end of the prompt, because many
    tokenizers drop the space that a text begins with.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(ids=self._whole(prompt_ids), skip_special_tokens=True)
        self._seen = list(prompt_ids[-_MOST_PRIMING:])
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; often empty in the middle of a character."""
        self._seen.append(token_id)
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._backend, token_id)
        except Exception:  # noqa: BLE001 - the bare class is what it raises
            # Bytes that cannot be text rewrite what was read before them (byte-fallback tokenizers): the stream gives
            # up. What is pending is shown as it decodes, and the stream begins anew.
            self._stream = DecodeStream(ids=self._whole(self._seen), skip_special_tokens=True)
            return self.flush()
        if piece is None:
            return ""
        self._pending.clear()
        return str(piece)

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        left = self._backend.decode(self._pending, skip_special_tokens=True) if self._pending else ""
        self._pending.clear()
        return str(left)

    def _whole(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt up to its last whole character: primed with half of one, the stream would repeat the prompt."""
        last = self._last(prompt_ids)
        for end in range(len(last), max(0, len(last) - _MAX_UNREADABLE_TOKENS), -1):
            ids = last[:end]
            if not self._backend.decode(ids, skip_special_tokens=True).endswith(_UNREADABLE):
                return ids
        return []

    def _last(self, prompt_ids: Sequence[int]) -> list[int]:
        """The fewest last tokens after which text reads as after all of them, which for a long prompt take long.

        There must be text among them, or the next space would be one that a text begins with; and they must not begin
        within a character, which makes bytes after it unreadable. Where most of a prompt is neither, it is cut.
        """
        for size in _PRIMING:
            ids = list(prompt_ids[-size:])
            text = self._backend.decode(ids, skip_special_tokens=True)
            if size >= len(prompt_ids) or (text and not text.startswith(_UNREADABLE)):
                return ids
        return list(prompt_ids[-_MOST_PRIMING:])


@dataclass(frozen=True)
class Piece:
    """Text that may be shown, and the stop string that ended it, if one did."""

    text: str
    stop_string: str = ""


class StopStrings:
    """Holds text back for as long as it could be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> Piece:
        """The part of the text so far that is safe to show."""
        self._held += text
        # The match that is complete first wins, so that the cuts do not matter; of two, the longer.
        starts = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if starts:
            start, stop = min(starts, key=lambda found: (found[0] + len(found[1]), found[0]))
            shown, self._held = self._held[:start], ""
            return Piece(shown, stop)
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return Piece(shown)

    def flush(self) -> str:
        """The text still held back: it was no stop string after all."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
