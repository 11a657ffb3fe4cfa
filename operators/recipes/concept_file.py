"""A file of concepts: TOML, checked as a whole before anything is built.

    [defaults]                 # for every concept that does not set the key itself
    layers = [15, 20]

    [[concept]]
    name = "ocean"             # gives ocean-layer15 and ocean-layer20
    texts = ["The waves of the ocean", "A ship on the open sea"]

All mistakes are reported at once, each with its file, line and key.
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
from operators.recipes.concept_entry import KEYS, ConceptEntry, format_value, suggest, validate_value
from operators.recipes.toml_lines import key_lines, line_of

MAX_BYTES = 16 << 20
_CONCEPT_ONLY = ("name", "text", "texts", "words")
_DEFAULT_KEYS = tuple(key for key in KEYS if key not in _CONCEPT_ONLY)
_EXCLUSIVE = (("text", "texts"), ("layer", "layers"), ("rank", "tolerance"))


@dataclass(frozen=True)
class LocatedEntry:
    """The entry of one operator, and where in the file it comes from. Filled by :func:`parse_concepts`."""

    entry: ConceptEntry
    concept: str
    """The name in the file; the entry's name also has the layer, where the file gives several."""
    source: str
    lines: Mapping[str, int]
    """Line numbers of the keys that were given, and of the concept's table under ``""``."""

    def at(self, *keys: str) -> str:
        """``"concepts.toml: line 12: concept 'ocean'"``, with the line of the first of ``keys`` that was given."""
        line = next((self.lines[key] for key in keys if key in self.lines), self.lines[""])
        return _located(self.source, line, _concept_label(self.concept))


def read_concept_file(path: Path) -> tuple[LocatedEntry, ...]:
    """The entries of a file, in its order: one per operator.

    Raises:
        ConceptFileError: the file cannot be read, or has mistakes.
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


def parse_concepts(text: str, source: str) -> tuple[LocatedEntry, ...]:
    """The entries of a document; ``source`` is its name in errors. Raises :class:`ConceptFileError`."""
    document = _parse_toml(text, source)
    reader = _Reader(source, key_lines(text))
    for key in document:
        if key not in ("defaults", "concept"):
            hint = suggest(key, ("defaults", "concept")) or "; [defaults] and [[concept]] are accepted"
            reader.add_problem((key,), f"key {format_value(key)} is unknown{hint}")
    defaults = reader.read_values(document.get("defaults", {}), ("defaults",), "[defaults]", _DEFAULT_KEYS)
    tables = document.get("concept", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        reader.add_problem(
            ("concept",), f"concept is {format_value(tables)}; tables that begin with [[concept]] are accepted"
        )
        tables = []
    elif not tables:
        reader.add_problem((), "there is no [[concept]]; at least one is needed")
    entries = tuple(
        entry for index, table in enumerate(tables) for entry in reader.read_concept(table, index, defaults)
    )
    _check_unique(entries, reader)
    if reader.problems:
        raise ConceptFileError(*reader.problems)
    return entries


class _Reader:
    """Reads tables; ``problems`` collects what is wrong with them."""

    def __init__(self, source: str, lines: Mapping[tuple[str | int, ...], int]) -> None:
        self.source, self.lines = source, lines
        self.problems: list[str] = []

    def add_problem(self, path: tuple[str | int, ...], *parts: str) -> None:
        self.problems.append(_located(self.source, line_of(self.lines, path), *parts))

    def read_values(
        self, table: object, path: tuple[str | int, ...], label: str, accepted: tuple[str, ...]
    ) -> dict[str, Any]:
        """The keys of one table with their validated values; mistakes go to ``problems``."""
        if not isinstance(table, dict):
            self.add_problem(path, f"{path[0]} is {format_value(table)}; a table is accepted")
            return {}
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key not in accepted:
                hint = suggest(key, accepted) or f"; accepted: {', '.join(accepted)}"
                self.add_problem((*path, key), label, f"key {format_value(key)} is unknown{hint}")
                continue
            try:
                values[key] = validate_value(key, value)
            except OperatorError as error:
                message = str(error)
                self.add_problem((*path, key), label, message if message.startswith(key) else f"{key}: {message}")
        for first, second in _EXCLUSIVE:
            if first in table and second in table:
                problem = f"keys {first!r} and {second!r} are both given; one is accepted"
                self.add_problem((*path, second), label, problem)
        return values

    def read_concept(self, table: Mapping[str, Any], index: int, defaults: Mapping[str, Any]) -> list[LocatedEntry]:
        """The entries of one ``[[concept]]``: one per layer; none where something is wrong with it."""
        path, num_problems = ("concept", index), len(self.problems)
        name = table.get("name")
        label = _concept_label(name) if isinstance(name, str) else f"concept {index + 1}"
        given = self.read_values(table, path, label, KEYS)
        if "name" not in table:
            self.add_problem(path, label, "key 'name' is missing")
        if "text" not in table and "texts" not in table:
            self.add_problem(path, label, "key 'text' or 'texts' is missing; one of them is needed")
        if len(self.problems) > num_problems:
            return []
        # A default gives way to the key itself, and to the one that excludes it.
        overridden = {key for pair in _EXCLUSIVE if not given.keys().isdisjoint(pair) for key in pair}
        values = {key: value for key, value in defaults.items() if key not in overridden} | given
        lines = {key: line_of(self.lines, (*path, key) if key in given else ("defaults", key)) for key in values}
        lines[""] = line_of(self.lines, path)
        texts = values.pop("text", None) or values.pop("texts")
        layers = values.pop("layers", None)
        entry = ConceptEntry(texts=texts, **values)
        if layers is None:
            return [LocatedEntry(entry, entry.name, self.source, lines)]
        entries = []
        for layer in layers:
            try:
                layer_name = check_name(f"{entry.name}-layer{layer}")
            except OperatorError as error:
                self.add_problem((*path, "name"), label, f"name: {error}")
                break
            layer_entry = replace(entry, name=layer_name, layer=layer)
            entries.append(LocatedEntry(layer_entry, entry.name, self.source, lines))
        return entries


def select_entries(entries: Iterable[LocatedEntry], names: Iterable[str]) -> tuple[LocatedEntry, ...]:
    """The entries that have one of the names, or belong to a concept of that name.

    Raises:
        ConceptFileError: no entry has a name; suggests a similar one, or lists those in the file.
    """
    entries, selected = tuple(entries), tuple(names)
    known = tuple(dict.fromkeys(name for located in entries for name in (located.concept, located.entry.name)))
    unknown = [
        f"{entries[0].source}: there is no concept {name!r}{suggest(name, known) or '; there are: ' + ', '.join(known)}"
        for name in selected
        if name not in known
    ]
    if unknown:
        raise ConceptFileError(*unknown)
    return tuple(located for located in entries if not {located.concept, located.entry.name}.isdisjoint(selected))


def _parse_toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.fullmatch(r"(.*) \(at line ([0-9]+), column ([0-9]+)\)", str(error), re.DOTALL)
        if found:
            raise ConceptFileError(f"{source}: line {found[2]}, column {found[3]}: {found[1]}") from error
        last = text.count("\n") + 1
        raise ConceptFileError(f"{source}: line {last}: {str(error).removesuffix(' (at end of document)')}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of nested brackets
        raise ConceptFileError(f"{source}: {error}") from error


def _check_unique(entries: Iterable[LocatedEntry], reader: _Reader) -> None:
    by_name: dict[str, LocatedEntry] = {}
    for located in entries:
        name = located.entry.name
        first = by_name.setdefault(name, located)
        if first is not located:
            reader.problems.append(f"{located.at('name')}: name {name!r} is already that of line {first.lines['']}")


def _concept_label(name: str) -> str:
    return f"concept {format_value(name)}"


def _located(source: str, line: int, *parts: str) -> str:
    return ": ".join([source, f"line {line}", *parts])
