"""The operators of the server's store, a row for each."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

import steer_client
from steer_client._cli.console import wide_console
from steer_client._cli.formatting import (
    anchor_part,
    escape_controls,
    format_number,
    layer_part,
    positions_part,
    short_digest,
)


def show_operators(infos: Sequence[steer_client.OperatorInfo]) -> None:
    """Prints a table of the usable operators, then each unusable one with its problem."""
    console = wide_console()
    if any(info.usable for info in infos):
        console.print(_table(infos))
    for info in infos:
        if not info.usable:
            name, problem = escape_controls(info.name), escape_controls(info.problem or "")
            console.print(Text.assemble((f"✗ {name}", "bold red"), f": {problem}"))
    if not infos:
        print("the server's store holds no operator", file=sys.stderr)


def reload_line(report: steer_client.ReloadReport) -> str:
    """What a reload changed in the store."""
    parts = [
        f"{field.name} {', '.join(names)}"
        for field in dataclasses.fields(report)
        if (names := getattr(report, field.name))
    ]
    return escape_controls("; ".join(parts) or "nothing changed")


def _table(infos: Sequence[steer_client.OperatorInfo]) -> Table:
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
            further = max(info.num_texts - 1, 0)
            table.add_row(
                Text(escape_controls(info.name), style="bold"),
                Text(escape_controls(info.concept).strip() + (f" (and {further} more)" if further else "")),
                info.profile,
                layer_part(info.layer, info.injection_layer),
                _kind(info),
                # A lens may recommend none.
                format_number(info.recommended_strength if info.lens is None or info.curve else None),
                format_number(info.recommended_blend),
                f"{info.recommended_rule}"
                f"{anchor_part(info.recommended_blend, info.recommended_anchor, info.recommended_first_token)}"
                f"{positions_part(info.recommended_positions)}",
                "yes" if info.calibrated else "no",
                short_digest(info.digest),
            )
    return table


def _kind(info: steer_client.OperatorInfo) -> str:
    """The rank of an operator, or what it is in place of one."""
    if info.lens is not None:
        return "lens"
    return "exact" if info.exact else "vector" if info.vector else str(info.rank)
