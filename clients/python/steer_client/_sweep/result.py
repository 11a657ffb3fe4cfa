"""What a sweep found: its rows, and everything that is made of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer_client._errors import SteerError
from steer_client._extras import need
from steer_client._html import cell
from steer_client._sweep.chart import curves
from steer_client._sweep.page import charts, page, summary_table
from steer_client._sweep.plots import plot
from steer_client._sweep.rows import SweepRow
from steer_client._sweep.statistics import ArmSummary, Estimate, by_arm, summarise

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

_COLUMNS = ("prompt_id", "seed", "arm", "operator", "strength", "hit", "useful", "found", "kl_mean", "perplexity",
            "tokens", "finish_reason", "prompt", "text")  # fmt: skip


@dataclass(frozen=True)
class SweepResult:
    """Every text of a sweep, by prompt, seed and arm, the plain one first."""

    rows: tuple[SweepRow, ...]
    #: What was looked for in the texts.
    words: tuple[str, ...]
    #: As the server calls it, and its fingerprint.
    model: str
    model_fingerprint: str
    #: By operator, the version that was used.
    digests: Mapping[str, str]

    @property
    def summaries(self) -> tuple[ArmSummary, ...]:
        """One for the plain texts, and one for every operator and strength."""
        arms = by_arm(self.rows)
        plain = [row for row in self.rows if row.strength is None]
        return tuple(summarise(rows, plain, has_words=bool(self.words)) for rows in arms.values())

    @property
    def changed_controls(self) -> tuple[SweepRow, ...]:
        """The texts at strength 0 that are not the plain ones: there must be none."""
        plain = {(row.prompt_id, row.seed): row.token_ids for row in self.rows if row.strength is None}
        controls = (row for row in self.rows if row.strength == 0)
        return tuple(row for row in controls if row.token_ids != plain[row.prompt_id, row.seed])

    @property
    def num_controls(self) -> int:
        """How many texts at strength 0 there are."""
        return sum(row.strength == 0 for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it: what was run, the summaries, the rows."""
        return {
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "digests": dict(self.digests),
            "words": list(self.words),
            "controls": {"texts": self.num_controls, "changed": len(self.changed_controls)},
            "summaries": [asdict(each) for each in self.summaries],
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_pandas(self) -> Any:
        """A DataFrame with one line per text. Needs the extra "tables"."""
        return need("pandas", "tables").DataFrame(self._records(), columns=list(_COLUMNS))

    def to_csv(self, path: str | Path | None = None) -> str:
        """The texts as CSV, one line each; written to `path` where one is given."""
        lines = io.StringIO()
        writer = csv.DictWriter(lines, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(record | {"found": ", ".join(record["found"])} for record in self._records())
        return _written(lines.getvalue(), path)

    def to_jsonl(self, path: str | Path | None = None) -> str:
        """The texts as JSON, one line each with its receipts; written to `path` where one is given."""
        return _written("".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in self.rows), path)

    def table(self) -> Table:
        """A rich table: what every operator did at every strength."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        title = _unmarked(f"{self.model}: {len(self.rows)} texts, 95 % intervals over prompts")
        # Narrow: with its intervals it fits into the 80 columns of a log.
        table = Table("operator", title=title, box=SIMPLE_HEAD, show_edge=False, padding=0)
        for name in ("λ", "n", "hits", "useful hits", "KL mean", "KL p95", "perplexity ratio"):
            table.add_column(name, justify="right")
        last = None
        for each in self.summaries:
            if last not in (None, each.operator):
                table.add_section()
            last = each.operator
            strength = "" if each.strength is None else f"{each.strength:g}"
            measured = (each.hits, each.useful_hits, each.kl_mean, each.kl_p95, each.perplexity_ratio)
            table.add_row(_unmarked(each.operator), strength, str(each.n), *map(_shown, measured))
        if self.num_controls:
            changed = len(self.changed_controls)
            table.caption = f"{self.num_controls} texts at λ = 0: " + (
                f"{changed} not as without steering" if changed else "all as without steering"
            )
        return table

    def plot(self, metric: str | None = None, ax: Any = None) -> Any:
        """Dose and response with intervals, as matplotlib's axes. Needs the extra "plots".

        `metric` is one of "hits", "useful_hits", "kl_mean", "kl_p95" and "perplexity_ratio"; by default useful hits,
        without words the mean KL. Raises ValueError for another.
        """
        return plot(curves(self.summaries, metric or ("useful_hits" if self.words else "kl_mean")), ax)

    def html(self, path: str | Path | None = None) -> str:
        """A page with charts, table and every text, words marked; it loads nothing. Written where a path is given."""
        facts = {
            "model": self.model,
            "fingerprint": self.model_fingerprint,
            "words": ", ".join(self.words),
            **{f"operator {name}": digest for name, digest in self.digests.items()},
        }
        if self.num_controls:
            facts["controls"] = f"{self.num_controls} texts at λ = 0, {len(self.changed_controls)} not the plain ones"
        return _written(page(self.rows, self.summaries, self.words, facts), path)

    def _repr_html_(self) -> str:
        return cell(summary_table(self.summaries), charts(self.summaries))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                "prompt_id": row.prompt_id,
                "seed": row.seed,
                "arm": row.arm,
                "operator": row.operator,
                "strength": row.strength,
                "hit": row.is_hit if self.words else None,
                "useful": row.is_useful if self.words else None,
                "found": row.found,
                "kl_mean": sum(row.kl_per_token) / len(row.kl_per_token) if row.kl_per_token else None,
                "perplexity": row.perplexity,
                "tokens": len(row.token_ids),
                "finish_reason": str(row.finish_reason),
                "prompt": row.prompt,
                "text": row.text,
            }
            for row in self.rows
        ]


class ControlChangedError(SteerError):
    """A text at strength 0 is not the plain one. `result` has the whole sweep all the same."""

    def __init__(self, result: SweepResult) -> None:
        changed = result.changed_controls
        first = changed[0]
        super().__init__(
            f"{len(changed)} of {result.num_controls} texts at strength 0 are not the plain ones, the first of them "
            f"{first.arm} of prompt {first.prompt_id!r} and seed {first.seed}; a server whose texts depend on what is "
            "decoded beside them cannot be measured by single texts"
        )
        self.result = result


def _shown(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(estimate)


def _unmarked(text: str) -> Any:
    """Other people's text, in which rich is to read no markup."""
    from rich.text import Text

    return Text(text)


def _written(content: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(content, encoding="utf-8", errors="backslashreplace", newline="")
    return content
