"""Words in a text, found as the builder's calibration and evaluation find them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from steer_client._errors import InvalidRequestError

# Scripts that are written without spaces between words; the builder has the same list.
SPACELESS = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9df"  # Tai Le, New Tai Lue, Tai Tham, Balinese, Javanese
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
)
_LETTER = rf"[^\W{SPACELESS}]"
# Hangul: words are set apart by spaces, but particles are written onto their end.
_TAKES_PARTICLES = re.compile("[\uac00-\ud7af\u1100-\u11ff\u3130-\u318f]")
_IS_SPACELESS = re.compile(f"[{SPACELESS}]")


class WordFinder:
    """Words to look for: matched whole, in any case; any white space separates the words of one entry.

    Where a word begins or ends in a script without spaces it is found within a sentence. Composed and decomposed
    characters are one.
    """

    def __init__(self, words: Iterable[str]) -> None:
        """Raises InvalidRequestError for a blank word, and for a text in place of a sequence of words."""
        if isinstance(words, str):
            raise InvalidRequestError(f"words: a sequence of texts is needed, not {words!r}", field="words")
        self.words = tuple(dict.fromkeys(words))
        for word in self.words:
            if not isinstance(word, str) or not word.strip():
                raise InvalidRequestError(f"words: {word!r} is no word, or is blank", field="words")
        self._patterns = {word: re.compile(_pattern(_normalised(word))) for word in self.words}

    def found(self, text: str) -> tuple[str, ...]:
        """Which of the words are in the text, in their own order."""
        normal = _normalised(text)
        return tuple(word for word, pattern in self._patterns.items() if pattern.search(normal))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where words stand in `text`, in order and apart, as (start, end) of its own characters."""
        if not self.words:
            return []
        # Normalising changes lengths, so it is done by character, with what combines with it.
        normal, places = "", []
        for start, end in _clusters(text):
            piece = _normalised(text[start:end])
            normal += piece
            places += [(start, end)] * len(piece)
        found = sorted(match.span() for pattern in self._patterns.values() for match in pattern.finditer(normal))
        spans: list[tuple[int, int]] = []
        for first, last in found:
            start, end = places[first][0], places[last - 1][1]
            if spans and start <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
            else:
                spans.append((start, end))
        return spans


def repeats(ids: Sequence[int], n: int = 4) -> bool:
    """Whether n tokens in a row come twice: a text that loops is read once."""
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return len(set(grams)) < len(grams)


def _clusters(text: str) -> Iterable[tuple[int, int]]:
    start = 0
    for place in range(1, len(text) + 1):
        if place == len(text) or not _combines(text[place]):
            yield start, place
            start = place


def _combines(character: str) -> bool:
    # A mark, or a vowel or final consonant of Hangul that is written as its own character.
    return unicodedata.combining(character) != 0 or "\u1160" <= character <= "\u11ff"


def _pattern(word: str) -> str:
    parts = word.split()
    before = "" if _IS_SPACELESS.match(parts[0][0]) else f"(?<!{_LETTER})"
    last = parts[-1][-1]
    after = "" if _IS_SPACELESS.match(last) or _TAKES_PARTICLES.match(last) else f"(?!{_LETTER})"
    return before + r"\s+".join(map(re.escape, parts)) + after


def _normalised(text: str) -> str:
    """Composed (NFC) and without case; folding may take characters apart, hence twice."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
