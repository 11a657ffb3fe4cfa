"""Where a TOML document says what: the parser gives values without their lines."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping

Path = tuple[str | int, ...]
"""A place in a document: keys, and indices into arrays of tables."""

# Longest quotes first. A multi-line string may end in up to two quotes of its own.
_STRING_OR_COMMENT = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|' + r"'''.*?'{3,5}|" + r'"(?:\\.|[^"\\\n])*"|' + r"'[^'\n]*'|" + r"\#[^\n]*", re.DOTALL
)


def key_lines(text: str) -> dict[Path, int]:
    """The line, from 1, of every table and key of a valid document.

    Tables and keys inside ``{...}`` and ``[...]`` values are not among them: those are where their value is.
    """
    lines: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    for line, statement, masked in _statements(text):
        if masked.lstrip().startswith("["):
            first = masked.index("[")
            width = 2 if masked[first + 1] == "[" else 1
            parts = _keys(statement[first + width : masked.index("]")])
            array = _indexed(parts[:-1], counts) + parts[-1:]
            if width == 2:
                counts[array] = counts.get(array, 0) + 1
            table, place = _indexed(parts, counts), array
        else:
            place = table + _keys(statement[: masked.index("=")])
        # What is around it may have no line of its own.
        for path in (*(place[:depth] for depth in range(1, len(place) + 1)), table):
            if path:
                lines.setdefault(path, line)
    return lines


def line_of(lines: Mapping[Path, int], path: Path) -> int:
    """The line of a place, or of the nearest one around it that has a line."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def _statements(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, text, and text with strings as underscores and comments as blanks, of each header and key = value."""
    # What is inside strings must look neither like structure nor like the end of a line.
    masked = _STRING_OR_COMMENT.sub(lambda found: (" " if found[0][0] == "#" else "_") * len(found[0]), text)
    depth, start, line = 0, 0, 1
    for mark in re.finditer(r"[\[\]{}]|\n|\Z", masked):
        if mark[0] in ("[", "{"):
            depth += 1
        elif mark[0] in ("]", "}"):
            depth -= 1
        elif depth == 0:
            if masked[start : mark.start()].strip():
                yield line, text[start : mark.start()], masked[start : mark.start()]
            line += text.count("\n", start, mark.end())
            start = mark.end()


def _keys(written: str) -> tuple[str, ...]:
    """``'a."b c"'`` -> ``("a", "b c")``, by the parser's own rules."""
    inner = tomllib.loads(f"{written} = 0")
    keys: list[str] = []
    while isinstance(inner, dict):
        ((key, inner),) = inner.items()
        keys.append(key)
    return tuple(keys)


def _indexed(keys: Path, counts: Mapping[Path, int]) -> Path:
    """The path with, after each array of tables, the index of its last table so far."""
    path: Path = ()
    for key in keys:
        path = (*path, key)
        if path in counts:
            path = (*path, counts[path] - 1)
    return path
