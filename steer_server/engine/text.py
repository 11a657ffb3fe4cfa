"""Incremental decoding of token ids to text: whole characters only, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream

_UNREADABLE = "\ufffd"
_MAX_UNREADABLE_TOKENS = 16
"""Tokens at the end of a prompt that are searched for the end of a character; one character has at most four."""
_PRIMING = (64, 65, 66, 67, 1024, 1025, 1026, 1027)
"""Numbers of last tokens to try; four in a row, because one of four tokens in a row begins a character."""
_MAX_PRIMING = 4096


class Detokenizer:
    """Incremental decoding of one continuation.

    No character is split between two pieces. The stream is primed with the end of the prompt, because many tokenizers
    drop a space at the beginning of a text.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._skip = skip_special_tokens
        self._stream = self._begin(prompt_ids)
        self._ids = list(prompt_ids[-_MAX_PRIMING:])
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty within a character."""
        self._ids.append(token_id)
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._backend, token_id)
        except Exception:  # noqa: BLE001 - the bare class is what it raises
            # With byte-fallback tokenizers, bytes that are not UTF-8 change how the tokens before them decode, and the
            # stream raises. The pending tokens are decoded on their own, and a new stream is begun.
            self._stream = self._begin(self._ids)
            return self.flush()
        if piece is None:
            return ""
        self._pending.clear()
        return str(piece)

    def flush(self) -> str:
        """The text of the pending tokens; an incomplete character becomes U+FFFD."""
        text = self._decode(self._pending) if self._pending else ""
        self._pending.clear()
        return text

    def _begin(self, prompt_ids: Sequence[int]) -> DecodeStream:
        return DecodeStream(ids=self._priming_ids(prompt_ids), skip_special_tokens=self._skip)

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=self._skip))

    def _priming_ids(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt's end up to its last whole character: primed with a part of one, the stream repeats the prompt."""
        last = self._last_ids(prompt_ids)
        for end in range(len(last), max(0, len(last) - _MAX_UNREADABLE_TOKENS), -1):
            ids = last[:end]
            if not self._decode(ids).endswith(_UNREADABLE):
                return ids
        return []

    def _last_ids(self, prompt_ids: Sequence[int]) -> list[int]:
        """A few last tokens after which text decodes as after the whole prompt; priming with a long one takes long.

        There must be text among them, or the next space counts as the beginning of a text and is dropped; and they must
        not begin within a character, because the bytes after it would not decode. Where no number of tokens in _PRIMING
        fulfils both, the last _MAX_PRIMING are taken.
        """
        for size in _PRIMING:
            ids = list(prompt_ids[-size:])
            text = self._decode(ids)
            if size >= len(prompt_ids) or (text and not text.startswith(_UNREADABLE)):
                return ids
        return list(prompt_ids[-_MAX_PRIMING:])


@dataclass(frozen=True)
class Piece:
    """Text that may be shown, and the stop string that ended the continuation, if one did."""

    text: str
    stop_string: str = ""


class StopStrings:
    """Finds stop strings, and holds back text that could be the beginning of one.

    Every character is looked at once, and of the stop strings only those that it continues or begins.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._held = ""
        self._begun: list[_Match] = []
        """Of the stop strings, those whose beginning the text ends with."""
        self._by_first: dict[str, list[_Match]] = {}
        for stop in dict.fromkeys(stops):
            self._by_first.setdefault(stop[0], []).append(_Match(stop))

    def push(self, text: str, *, may_end: bool = True) -> Piece:
        """Adds text: what may be shown of all that is held, and the stop string that was found, if any.

        Without ``may_end`` those that end within ``text`` are passed over.
        """
        for place, character in enumerate(text, start=len(self._held) + 1):
            # The match that ends first wins, so that the result does not depend on how the text is cut; of two, the
            # longer.
            complete = self._add(character)
            if complete and not may_end:
                self._pass_over()
            elif complete:
                stop = max(complete, key=len)
                shown = (self._held + text)[: place - len(stop)]
                self._forget()
                return Piece(shown, stop)
        self._held += text
        cut = len(self._held) - max((match.length for match in self._begun), default=0)
        shown, self._held = self._held[:cut], self._held[cut:]
        return Piece(shown)

    def flush(self) -> str:
        """The text still held back, which turned out not to be a stop string."""
        shown = self._held
        self._forget()
        return shown

    def _add(self, character: str) -> list[str]:
        """The stop strings that end with this character."""
        starting = [match for match in self._by_first.get(character, ()) if not match.length]
        for match in self._begun:
            match.add(character)
        for match in starting:
            match.length = 1
        self._begun = [match for match in self._begun if match.length] + starting
        return [match.stop for match in self._begun if match.length == len(match.stop)]

    def _pass_over(self) -> None:
        for match in self._begun:
            match.pass_over()
        self._begun = [match for match in self._begun if match.length]

    def _forget(self) -> None:
        self._held = ""
        for match in self._begun:
            match.length = 0
        self._begun = []


class _Match:
    """How much of one stop string a text ends with: the algorithm of Knuth, Morris and Pratt.

    Its table is made as far as the text has come, so that a stop string costs nothing before it is begun.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        """The text ends with so many of its first characters."""
        self._next = [-1]
        """By length: the longest shorter length that another character may continue; -1: none may."""
        self._border = 0
        """Of the first ``len(_next)`` characters, how many of the last are also the first."""

    def add(self, character: str) -> None:
        """The text goes on with this character."""
        length = self.length
        while length >= 0 and self.stop[length] != character:
            length = self._shorter(length)
        self.length = length + 1

    def pass_over(self) -> None:
        """Where the text ends with all of it: what of it may be the beginning of another."""
        if self.length == len(self.stop):
            self._shorter(self.length - 1)  # makes the rest of the table
            self.length = self._border

    def _shorter(self, length: int) -> int:
        stop, shorter = self.stop, self._next
        while len(shorter) <= length:
            size, border = len(shorter), self._border
            shorter.append(shorter[border] if stop[border] == stop[size] else border)
            while border >= 0 and stop[border] != stop[size]:
                border = shorter[border]
            self._border = border + 1
        return shorter[length]
