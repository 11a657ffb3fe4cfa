"""Tables of the store and of the model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from steer_client._cli.words import number, short_digest, visible
from steer_client._results import ModelInfo
from steer_client._store import OperatorInfo, ReloadReport

_PIPE_WIDTH = 1000


def show_operators(infos: Sequence[OperatorInfo]) -> None:
    """Prints the store: a table of what can be used, then what cannot and why."""
    console = wide_console()
    if any(info.usable for info in infos):
        console.print(_operators(infos))
    for info in infos:
        if not info.usable:
            console.print(Text.assemble((f"✗ {visible(info.name)}", "bold red"), f": {visible(info.problem or '')}"))
    if not infos:
        print("the server's store holds no operator", file=sys.stderr)


def show_model(info: ModelInfo) -> None:
    """Prints the model."""
    wide_console().print(_model(info))


def wide_console() -> Console:
    """Stdout, as wide as a terminal is, or wider than any line."""
    console = Console(highlight=False)
    # Down a pipe nothing is cut short to fit a screen that is not there.
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def _operators(infos: Sequence[OperatorInfo]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)
    for title in ("concept", "profile"):
        table.add_column(title, overflow="fold")
    for title in ("layer", "rank", "λ", "β"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("rule", "calibrated", "digest"):
        table.add_column(title, overflow="fold")
    for info in infos:
        if info.usable:
            more = info.num_texts - 1
            table.add_row(
                Text(visible(info.name), style="bold"),
                Text(visible(info.concept).strip() + (f" (and {more} more)" if more else "")),
                info.profile,
                str(info.injection_layer),
                "exact" if info.exact else str(info.rank),
                number(info.recommended_strength),
                number(info.recommended_blend),
                info.recommended_rule,
                "yes" if info.calibrated else "no",
                short_digest(info.digest),
            )
    return table


def _model(info: ModelInfo) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for field in dataclasses.fields(info):
        value = getattr(info, field.name)
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        elif isinstance(value, tuple):
            shown = ", ".join(map(str, value)) or "–"
        else:
            shown = str(value) or "–"
        table.add_row(field.name.replace("_", " "), Text(visible(shown)))
    return table


def reload(report: ReloadReport) -> str:
    """One line."""
    parts = [
        f"{field.name} {', '.join(names)}"
        for field in dataclasses.fields(report)
        if (names := getattr(report, field.name))
    ]
    return visible("; ".join(parts) or "nothing changed")
