"""A file of concepts: TOML, checked as a whole before anything is built.

    [defaults]                 # for every concept that says nothing else
    layers = [15, 20]

    [[concept]]
    name = "ocean"             # gives ocean-layer15 and ocean-layer20
    texts = ["The waves of the ocean", "A ship on the open sea"]

Every mistake is told with its file, line and key, and all of them at once.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from operators.core.errors import ConceptFileError, OperatorError
from operators.core.store import check_name
from operators.recipes.concept_entry import KEYS, ConceptEntry, checked, hint, shown
from operators.recipes.toml_lines import key_lines, line_of

MAX_BYTES = 16 << 20
_OF_ONE_CONCEPT = ("name", "text", "texts", "words")
_DEFAULTS = tuple(key for key in KEYS if key not in _OF_ONE_CONCEPT)
_EITHER_OR = (("text", "texts"), ("layer", "layers"), ("rank", "tolerance"))


@dataclass(frozen=True)
class FileEntry:
    """One operator that a file asks for. Filled by :func:`parse_concepts`."""

    entry: ConceptEntry
    concept: str
    """The name in the file; the entry's has the layer as well where the file names several."""
    source: str
    lines: Mapping[str, int]
    """Of the keys that were given, and of the concept's table as ``""``."""

    def at(self, *keys: str) -> str:
        """``"concepts.toml: line 12: concept 'ocean'"``: where the first of ``keys`` that was given is."""
        line = next((self.lines[key] for key in keys if key in self.lines), self.lines[""])
        return _at(self.source, line, _concept(self.concept))


def read_concept_file(path: Path) -> tuple[FileEntry, ...]:
    """Every operator that the file asks for, in its order.

    Raises:
        ConceptFileError: it cannot be read, or has mistakes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConceptFileError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ConceptFileError(f"{path}: more than {MAX_BYTES} bytes; a file of concepts has at most that many")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConceptFileError(
            f"{path}: line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; TOML files are"
        ) from error
    return parse_concepts(text, str(path))


def parse_concepts(text: str, source: str) -> tuple[FileEntry, ...]:
    """Every operator that a document asks for; ``source`` names it in errors. Raises :class:`ConceptFileError`."""
    document = _parsed(text, source)
    reader = _Reader(source, key_lines(text))
    for key in document:
        if key not in ("defaults", "concept"):
            near = hint(key, ("defaults", "concept"))
            reader.wrong((key,), f"key {shown(key)} is unknown{near or '; [defaults] and [[concept]] are accepted'}")
    defaults = reader.values(document.get("defaults", {}), ("defaults",), "[defaults]", _DEFAULTS)
    tables = document.get("concept", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        reader.wrong(("concept",), f"concept is {shown(tables)}; tables that begin with [[concept]] are accepted")
        tables = []
    elif not tables:
        reader.wrong((), "there is no [[concept]]; at least one is needed")
    found = tuple(one for index, table in enumerate(tables) for one in reader.concept(table, index, defaults))
    _check_unique(found, reader)
    if reader.problems:
        raise ConceptFileError(*reader.problems)
    return found


class _Reader:
    """Takes tables apart, and gathers what is wrong with them in ``problems``."""

    def __init__(self, source: str, lines: Mapping[tuple[str | int, ...], int]) -> None:
        self.source, self.lines = source, lines
        self.problems: list[str] = []

    def wrong(self, path: tuple[str | int, ...], *what: str) -> None:
        self.problems.append(_at(self.source, line_of(self.lines, path), *what))

    def values(
        self, table: object, path: tuple[str | int, ...], label: str, accepted: tuple[str, ...]
    ) -> dict[str, Any]:
        """The keys of one table with their checked values."""
        if not isinstance(table, dict):
            self.wrong(path, f"{path[0]} is {shown(table)}; a table is accepted")
            return {}
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key not in accepted:
                near = hint(key, accepted) or f"; accepted: {', '.join(accepted)}"
                self.wrong((*path, key), label, f"key {shown(key)} is unknown{near}")
                continue
            try:
                values[key] = checked(key, value)
            except OperatorError as error:
                said = str(error)
                self.wrong((*path, key), label, said if said.startswith(key) else f"{key}: {said}")
        for one, other in _EITHER_OR:
            if one in table and other in table:
                self.wrong((*path, other), label, f"keys {one!r} and {other!r} are both given; one is accepted")
        return values

    def concept(self, table: Mapping[str, Any], index: int, defaults: Mapping[str, Any]) -> list[FileEntry]:
        """The operators of one ``[[concept]]``: none when something is wrong with it."""
        path, before = ("concept", index), len(self.problems)
        name = table.get("name")
        label = _concept(name) if isinstance(name, str) else f"concept {index + 1}"
        own = self.values(table, path, label, KEYS)
        if "name" not in table:
            self.wrong(path, label, "key 'name' is missing")
        if "text" not in table and "texts" not in table:
            self.wrong(path, label, "key 'text' or 'texts' is missing; one of them is needed")
        if len(self.problems) > before:
            return []
        rivals = {key for pair in _EITHER_OR if not own.keys().isdisjoint(pair) for key in pair}
        values = {key: value for key, value in defaults.items() if key not in rivals} | own
        lines = {key: line_of(self.lines, (*path, key) if key in own else ("defaults", key)) for key in values}
        lines[""] = line_of(self.lines, path)
        texts = values.pop("text", None) or values.pop("texts")
        layers = values.pop("layers", None)
        entry = ConceptEntry(texts=texts, **values)
        if layers is None:
            return [FileEntry(entry, entry.name, self.source, lines)]
        found = []
        for layer in layers:
            try:
                full = check_name(f"{entry.name}-layer{layer}")
            except OperatorError as error:
                self.wrong((*path, "name"), label, f"name: {error}")
                break
            found.append(FileEntry(replace(entry, name=full, layer=layer), entry.name, self.source, lines))
        return found


def pick(entries: Iterable[FileEntry], names: Iterable[str]) -> tuple[FileEntry, ...]:
    """Those entries that have one of the names, or belong to a concept of that name.

    Raises:
        ConceptFileError: nothing has a name; says what is meant, or there is.
    """
    entries, wanted = tuple(entries), tuple(names)
    known = tuple(dict.fromkeys(name for one in entries for name in (one.concept, one.entry.name)))
    unknown = [
        f"{entries[0].source}: there is no concept {name!r}{hint(name, known) or '; there are: ' + ', '.join(known)}"
        for name in wanted
        if name not in known
    ]
    if unknown:
        raise ConceptFileError(*unknown)
    return tuple(one for one in entries if one.concept in wanted or one.entry.name in wanted)


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error), re.DOTALL)
        if found:
            raise ConceptFileError(f"{source}: line {found[2]}, column {found[3]}: {found[1]}") from error
        last = text.count("\n") + 1
        raise ConceptFileError(f"{source}: line {last}: {str(error).removesuffix(' (at end of document)')}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in thousands of brackets
        raise ConceptFileError(f"{source}: {error}") from error


def _check_unique(found: Iterable[FileEntry], reader: _Reader) -> None:
    first: dict[str, FileEntry] = {}
    for one in found:
        before = first.setdefault(one.entry.name, one)
        if before is not one:
            taken = f"name {one.entry.name!r} is already that of line {before.lines['']}"
            reader.problems.append(f"{one.at('name')}: {taken}")


def _concept(name: str) -> str:
    return f"concept {shown(name)}"


def _at(source: str, line: int, *what: str) -> str:
    return ": ".join([source, f"line {line}", *what])
