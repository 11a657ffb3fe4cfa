"""A sweep as HTML: in a notebook, and as a page of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steer_client import _html as html
from steer_client._matching import WordFinder
from steer_client._sweep.chart import curves, svg
from steer_client._sweep.rows import SweepRow
from steer_client._sweep.statistics import METRICS, ArmSummary, Estimate

# Nothing is loaded, and no script runs, whatever a text holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_PAGE_STYLE = (
    "<style>:root { color-scheme: light dark } body { font: 16px/1.45 system-ui, sans-serif; margin: 2em auto; "
    "max-width: 72em; padding: 0 1em } svg { max-width: 100%; height: auto } .charts { display: flex; flex-wrap: wrap; "
    "gap: 1em } summary { cursor: pointer; overflow-wrap: anywhere }</style>"
)


def summary_table(summaries: Sequence[ArmSummary]) -> str:
    """What every operator did at every strength."""
    titles = ("λ", "n", "hits", "useful hits", "KL mean", "KL p95", "perplexity ratio")
    return html.table(
        [("operator", ""), *((title, "number") for title in titles)],
        (
            [
                html.escape(each.operator),
                "" if each.strength is None else f"{each.strength:g}",
                str(each.n),
                *(_shown(getattr(each, metric)) for metric in METRICS),
            ]
            for each in summaries
        ),
    )


def charts(summaries: Sequence[ArmSummary]) -> str:
    """Of every metric that was measured, dose and response."""
    drawn = []
    for metric in METRICS:
        try:
            drawn.append(svg(curves(summaries, metric)))
        except ValueError:
            continue
    return f'<div class="charts">{"".join(drawn)}</div>'


def page(
    rows: Sequence[SweepRow], summaries: Sequence[ArmSummary], words: Sequence[str], facts: Mapping[str, str]
) -> str:
    """The whole page. `facts`: what was run, by what it is called."""
    finder = WordFinder(words)
    by_prompt: dict[str, list[SweepRow]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_id, []).append(row)
    texts = "".join(_prompt(name, each, finder) for name, each in by_prompt.items())
    known = html.table(
        [("", ""), ("", "text")], ([html.escape(name), html.escape(value)] for name, value in facts.items())
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width"><title>Sweep</title>'
        f'{html.STYLE}{_PAGE_STYLE}</head><body class="steer"><h1>Sweep</h1>{known}'
        f"<h2>Dose and response</h2>{charts(summaries)}<h2>By operator and strength</h2>{summary_table(summaries)}"
        "<p class=\"note\">95 % intervals over prompts: Wilson's of shares, a bootstrap's of the others. "
        "Dashed: the plain texts.</p>"
        f"<h2>Texts</h2>{texts}</body></html>\n"
    )


def _prompt(name: str, rows: Sequence[SweepRow], finder: WordFinder) -> str:
    lines = html.table(
        [("arm", ""), ("seed", "number"), ("text", "text")],
        ([html.escape(row.arm), str(row.seed), html.marked(row.text, finder.spans(row.text))] for row in rows),
    )
    return f"<details open><summary>{html.escape(name)}: {html.escape(rows[0].prompt)}</summary>{lines}</details>"


def _shown(estimate: Estimate | None) -> str:
    return "" if estimate is None else html.escape(str(estimate))
