"""Which parts of a text differ from another, and which name a concept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from rich.text import Text

# Thai to Khmer, kana and Han: written without spaces, so each character is compared alone.
_SPACELESS = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\s{_SPACELESS}]+")

CONCEPT_STYLE = "underline green"
DIVERGENCE_STYLE = "reverse"


def changed_spans(plain: str, other: str) -> Iterator[tuple[int, int]]:
    """Where `other` has words that `plain` has not at their place, as (start, end) in `other`, in order."""
    theirs = list(_WORD.finditer(other))
    matcher = SequenceMatcher(None, _WORD.findall(plain), [word[0] for word in theirs], autojunk=False)
    for kind, _, _, start, end in matcher.get_opcodes():
        if kind in ("replace", "insert"):
            yield theirs[start].start(), theirs[end - 1].end()


def mark_words(text: Text, words: Sequence[str]) -> None:
    """Styles each of the words, in any case, where it stands alone or begins a longer one ("sea" in "seas")."""
    for word in filter(None, words):
        before, after = ("", "") if re.match(f"[{_SPACELESS}]", word) else (r"(?<!\w)", r"\w*")
        text.highlight_regex(re.compile(before + re.escape(word) + after, re.IGNORECASE), CONCEPT_STYLE)


def read_words(text: str | None) -> tuple[str, ...]:
    """The words of a list such as "sea, wave", each once."""
    return tuple(dict.fromkeys(word.strip() for word in (text or "").split(",") if word.strip()))
