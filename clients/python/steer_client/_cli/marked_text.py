"""Which parts of a text differ from another, and which name a concept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

CONCEPT_STYLE = "underline green"
DIVERGENCE_STYLE = "reverse"


def changed_spans(plain: str, other: str) -> Iterator[tuple[int, int]]:
    """Where `other` has words that `plain` has not at their place, as (start, end) in `other`, in order."""
    # Imported here because it imports gRPC, and the commands' help does without.
    from steer_client._diff import word_diff

    place = 0
    for change in word_diff(plain, other):
        if change.kind == "removed":
            continue
        start, place = place, place + len(change.text)
        # The white space before a word is no part of what differs.
        start += len(change.text) - len(change.text.lstrip())
        if change.kind == "added" and start < place:
            yield start, place


def mark_words(text: Text, words: Sequence[str]) -> None:
    """Styles each of the words, found as a sweep finds them: whole, in any case, in any script."""
    from steer_client._matching import WordFinder

    for start, end in WordFinder(words).spans(text.plain):
        text.stylize(CONCEPT_STYLE, start, end)


def read_words(text: str | None) -> tuple[str, ...]:
    """The words of a list such as "sea, wave", each once."""
    return tuple(dict.fromkeys(word.strip() for word in (text or "").split(",") if word.strip()))
