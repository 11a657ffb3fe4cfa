"""The concepts of an evaluation: texts that they are made from, and words that show them. TOML.

[[concept]]
name = "hospital"
texts = ["...", "...", "..."]      # what operators and anchors are built from
words = ["hospital", "nurse"]      # a text with one of these, whole and in any case, is a hit
word = "hospital"                  # the one word of a lens; hits of it alone are counted apart
fresh = true                       # never used while the forms were developed
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from operators.builder.concept import check_text
from operators.core.errors import ArtifactError, ConceptError, TrialError
from operators.core.file_format import open_regular

_MAX_BYTES = 1 << 20
_MAX_CONCEPTS, _MAX_TEXTS, _MAX_WORDS, _MAX_WORD = 256, 64, 256, 128
_KEYS = {"name", "texts", "words", "word", "fresh"}


@dataclass(frozen=True)
class EvalConcept:
    """A concept: ``texts`` to build from, ``words`` that show it, ``word`` its name. ``fresh``: never developed on."""

    name: str
    texts: tuple[str, ...]
    words: tuple[str, ...]
    word: str
    fresh: bool


def packaged_concepts() -> tuple[EvalConcept, ...]:
    """The concepts that ship: four that development used, and six that it never did."""
    text = (resources.files("operators") / "data" / "concepts_evaluation.toml").read_text(encoding="utf-8")
    return parse_concepts(text, "concepts_evaluation.toml")


def read_concepts(path: Path) -> tuple[EvalConcept, ...]:
    """The concepts of a file. Raises :class:`TrialError` naming file, concept and key."""
    try:
        with open_regular(path, _MAX_BYTES) as (file, num_bytes):
            text = file.read(num_bytes).decode()
    except (ArtifactError, UnicodeDecodeError) as error:
        raise TrialError(f"concepts {path}: cannot be read: {error}") from error
    return parse_concepts(text, str(path))


def choose_concepts(concepts: Sequence[EvalConcept], names: Sequence[str]) -> tuple[EvalConcept, ...]:
    """The concepts of these names, in the order of the file.

    Raises:
        TrialError: there is none of that name; lists those that there are.
    """
    there = [concept.name for concept in concepts]
    unknown = next((name for name in names if name not in there), None)
    if unknown is not None:
        raise TrialError(f"concept {unknown!r} does not exist; there are: {', '.join(there)}")
    return tuple(concept for concept in concepts if concept.name in names)


def parse_concepts(text: str, source: str) -> tuple[EvalConcept, ...]:
    """The concepts of a document. Raises :class:`TrialError` naming ``source``, concept and key."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TrialError(f"concepts {source}: not TOML: {error}") from error
    tables = document.get("concept")
    if set(document) != {"concept"} or not isinstance(tables, list) or not 1 <= len(tables) <= _MAX_CONCEPTS:
        raise TrialError(f"concepts {source}: 1 to {_MAX_CONCEPTS} tables [[concept]], and nothing else, are accepted")
    concepts = tuple(_concept(table, f"concepts {source}: concept {index}") for index, table in enumerate(tables, 1))
    names = [concept.name for concept in concepts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise TrialError(f"concepts {source}: {twice!r} is there twice; each name once is accepted")
    return concepts


def _concept(table: Any, where: str) -> EvalConcept:
    if not isinstance(table, Mapping) or not _KEYS - {"fresh"} <= set(table) <= _KEYS:
        raise TrialError(f"{where}: the keys name, texts, words, word and, if wanted, fresh are accepted")
    name, word, fresh = table["name"], table["word"], table.get("fresh", False)
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _MAX_WORD:
        raise TrialError(f"{where}: name is {name!r}; 1 to {_MAX_WORD} printable characters are accepted")
    where = f"{where} ({name})"
    if not isinstance(fresh, bool):
        raise TrialError(f"{where}: fresh is {fresh!r}; true or false is accepted")
    texts = _strings(table["texts"], _MAX_TEXTS, f"{where}: texts")
    words = _strings(table["words"], _MAX_WORDS, f"{where}: words")
    (word,) = _strings([word], 1, f"{where}: word")
    try:
        for text in texts:
            check_text(text)
    except ConceptError as error:
        raise TrialError(f"{where}: texts: {error}") from error
    if next((len(one) > _MAX_WORD for one in (*words, word) if len(one) > _MAX_WORD), False):
        raise TrialError(f"{where}: words of at most {_MAX_WORD} characters are accepted")
    if word not in words:
        raise TrialError(f"{where}: word {word!r} is not among its words; one of them is accepted")
    return EvalConcept(name, texts, words, word, fresh)


def _strings(values: Any, most: int, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not 1 <= len(values) <= most:
        raise TrialError(f"{where}: a list of 1 to {most} is accepted")
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise TrialError(f"{where}: {value!r} is no text; strings that are not blank are accepted")
    return tuple(values)
