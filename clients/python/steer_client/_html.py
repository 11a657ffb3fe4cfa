"""Texts as HTML. Whatever a model, a user or a server wrote is escaped here."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from steer_client._diff import Change

# What HTML forbids even escaped; and what turns the direction of the text around it.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")

#: Of tables and marks, for a notebook's cell as for a page.
STYLE = """<style>
.steer table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.steer th, .steer td { padding: .25em .7em; text-align: left; vertical-align: top; border-bottom: 1px solid #8886 }
.steer td.number, .steer th.number { text-align: right; white-space: nowrap }
.steer td.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 60em }
.steer mark { background: #fd6; color: #000 } .steer ins { text-decoration: none; background: #4a93; }
.steer del { opacity: .5 } .steer .note { opacity: .7; font-size: .9em }
</style>"""


def escape(text: object) -> str:
    """Text for an element or an attribute in quotes; a forbidden character is U+FFFD."""
    return html.escape(_FORBIDDEN.sub("\ufffd", str(text)))


def marked(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """The text with <mark> around these stretches, which are in order and apart."""
    parts, last = [], 0
    for start, end in spans:
        parts += [escape(text[last:start]), f"<mark>{escape(text[start:end])}</mark>"]
        last = end
    return "".join([*parts, escape(text[last:])])


def diffed(changes: Iterable[Change]) -> str:
    """The second of two texts with <ins>, and <del> for what the first has in its place."""
    tags = {"same": "{}", "removed": "<del>{}</del>", "added": "<ins>{}</ins>"}
    return "".join(tags[change.kind].format(escape(change.text)) for change in changes)


def table(head: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already. `head`: title and class of each column; a class may be empty."""
    kinds = [f' class="{kind}"' if kind else "" for _, kind in head]
    titles = "".join(f"<th{kind}>{escape(title)}</th>" for (title, _), kind in zip(head, kinds, strict=True))
    lines = [
        "<tr>" + "".join(f'<td{kind} dir="auto">{cell}</td>' for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    ]
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def cell(*parts: str) -> str:
    """What a notebook shows, with its style."""
    return f'<div class="steer">{STYLE}{"".join(parts)}</div>'
