"""Line numbers of the tables and keys of a TOML document: the parser of the standard library gives none."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping

KeyPath = tuple[str | int, ...]
"""A place in a document: keys, and indices into arrays of tables."""

# Longest quotes first. A multi-line string may end in up to two quotes of its own.
_STRING_OR_COMMENT = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|' + r"'''.*?'{3,5}|" + r'"(?:\\.|[^"\\\n])*"|' + r"'[^'\n]*'|" + r"\#[^\n]*", re.DOTALL
)


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line number, from 1, of every table and key of a valid document.

    Tables and keys inside ``{...}`` and ``[...]`` values have no entry: :func:`line_of` gives the line of the value.
    """
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for line, statement, masked in _statements(text):
        if masked.lstrip().startswith("["):
            first = masked.index("[")
            width = 2 if masked[first + 1] == "[" else 1
            parts = _parse_keys(statement[first + width : masked.index("]")])
            array = _with_indices(parts[:-1], counts) + parts[-1:]
            if width == 2:
                counts[array] = counts.get(array, 0) + 1
            table, place = _with_indices(parts, counts), array
        else:
            place = table + _parse_keys(statement[: masked.index("=")])
        # Tables around it may have no header of their own.
        for path in (*(place[:depth] for depth in range(1, len(place) + 1)), table):
            if path:
                lines.setdefault(path, line)
    return lines


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """The line of a place, or of the innermost one around it that has an entry."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def _statements(text: str) -> Iterator[tuple[int, str, str]]:
    """Per header or key = value: its line, its text, and its text with strings masked by "_" and comments by blanks."""
    # Brackets and line ends inside strings are not structure.
    masked = _STRING_OR_COMMENT.sub(lambda found: (" " if found[0][0] == "#" else "_") * len(found[0]), text)
    depth, start, line = 0, 0, 1
    for token in re.finditer(r"[\[\]{}]|\n|\Z", masked):
        if token[0] in ("[", "{"):
            depth += 1
        elif token[0] in ("]", "}"):
            depth -= 1
        elif depth == 0:
            if masked[start : token.start()].strip():
                yield line, text[start : token.start()], masked[start : token.start()]
            line += text.count("\n", start, token.end())
            start = token.end()


def _parse_keys(text: str) -> tuple[str, ...]:
    """``'a."b c"'`` -> ``("a", "b c")``, by the parser of the standard library."""
    inner = tomllib.loads(f"{text} = 0")
    keys: list[str] = []
    while isinstance(inner, dict):
        ((key, inner),) = inner.items()
        keys.append(key)
    return tuple(keys)


def _with_indices(keys: KeyPath, counts: Mapping[KeyPath, int]) -> KeyPath:
    """The path with, after each array of tables, the index of its last table so far."""
    path: KeyPath = ()
    for key in keys:
        path = (*path, key)
        if path in counts:
            path = (*path, counts[path] - 1)
    return path
