"""HTML pages that need nothing but themselves: their style and images are inside, and text is always escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from operators.analyse.canvas import ThemedImage
from operators.analyse.results import ScoredToken
from operators.analyse.tokens import visible

PAPER = "J. R. Golden, Equivalent Linear Mappings of Large Language Models, TMLR 2025, arXiv 2505.24293"

# Forbids scripts and anything from elsewhere, so that the browser enforces what this module promises.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --muted: #5b6470; --line: #dfe3e8; --card: #f5f7f9;
  --chip: #e8eef5; --hit: #d3efe3; --hit-ink: #065a41; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e7eaee; --muted: #9aa4b0; --line: #2d343c;
  --card: #1c2229; --chip: #26303a; --hit: #143f31; --hit-ink: #8fe3c4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; line-height: 1.3; margin: 0 0 6px; overflow-wrap: anywhere; }
h1.long { font-size: 18px; font-weight: 600; }
h2 { font-size: 20px; margin: 48px 0 6px; padding-top: 16px; border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 28px 0 4px; }
p { margin: 6px 0 12px; max-width: 78ch; }
.meta, figcaption, .note { color: var(--muted); font-size: 14px; }
figcaption { max-width: 90ch; margin-top: 6px; }
figure { margin: 18px 0 28px; }
img { max-width: 100%; height: auto; display: block; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 22px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 21px; line-height: 1.3; font-weight: 600; overflow-wrap: anywhere; }
.card span { color: var(--muted); font-size: 13px; }
.scroll { overflow-x: auto; margin: 10px 0 24px; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--muted); border-bottom: 2px solid var(--line); padding: 6px 10px;
  vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); padding: 5px 10px; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: 13px/1.5 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--chip); border-radius: 4px; padding: 1px 5px; margin: 1px 2px 1px 0; white-space: nowrap;
  display: inline-block; }
code.hit { background: var(--hit); color: var(--hit-ink); font-weight: 600; }
summary { cursor: pointer; color: var(--muted); }
dt { font-weight: 600; }
dd { margin: 0 0 8px; color: var(--muted); }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document. ``body`` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def figure(image: ThemedImage, *, alt: str, caption: str) -> str:
    """An image for both themes, with its alternative text; ``caption`` is HTML."""
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data(image.dark)}">'
        f'<img src="{_data(image.light)}" alt="{escape(alt)}"></picture>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def cards(pairs: Iterable[tuple[str, str]]) -> str:
    """Headline numbers: (what it is, its value). Values are HTML."""
    inner = "".join(f'<div class="card"><b>{value}</b><span>{escape(name)}</span></div>' for name, value in pairs)
    return f'<div class="cards">{inner}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()) -> str:
    """A table of HTML cells; the columns in ``numbers`` are aligned right."""
    right = set(numbers)

    def line(cells: Sequence[str], tag: str) -> str:
        marked = (f'<{tag} class="n">' if i in right else f"<{tag}>" for i in range(len(cells)))
        return "<tr>" + "".join(f"{mark}{cell}</{tag}>" for mark, cell in zip(marked, cells, strict=True)) + "</tr>"

    inner = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(heads, "th")}</thead>\n<tbody>\n{inner}\n</tbody></table></div>'


def chips(tokens: Iterable[ScoredToken], *, hit: int | None = None) -> str:
    """Tokens, their white space marked; the token ``hit`` stands out."""
    return " ".join(chip(token, hit=token.id == hit) for token in tokens) or "–"


def chip(token: ScoredToken, *, hit: bool = False) -> str:
    """One token. Isolated, so that right-to-left text stays in its own box."""
    mark = ' class="hit"' if hit else ""
    return f"<code{mark}><bdi>{escape(visible(token.text))}</bdi></code>"


def number(value: float | None, digits: int = 3) -> str:
    """A number with few digits, or a dash."""
    return "–" if value is None else f"{value:.{digits}g}"


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
