"""Dose and response in a terminal: a line per strength, its value on an axis, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from steer_client._cli.formatting import escape_controls, format_number

if TYPE_CHECKING:
    from steer_client._sweep.statistics import ArmSummary, Estimate

_WIDTH = 48
_SHARES = ("hits", "useful_hits")


def dose_chart(summaries: Sequence[ArmSummary], metric: str) -> Table:
    """Every arm's metric on one axis from 0: shares to 1, others to the highest end of an interval."""
    estimates = [getattr(each, metric) for each in summaries]
    top = 1.0 if metric in _SHARES else max((_ends(each)[1] for each in estimates if each), default=0.0)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("operator")
    table.add_column("λ", justify="right")
    table.add_column(f"{metric.replace('_', ' ')}, 0 to {format_number(top)}", no_wrap=True, min_width=_WIDTH)
    table.add_column("")
    last = ""
    for each, estimate in zip(summaries, estimates, strict=True):
        name = "" if each.operator == last else escape_controls(each.operator)
        last = each.operator
        strength = "" if each.strength is None else f"{each.strength:g}"
        table.add_row(Text(name), strength, Text(axis(estimate, top)), str(estimate) if estimate else "–")
    return table


def axis(estimate: Estimate | None, top: float, width: int = _WIDTH) -> str:
    """For example "····├──●────┤···": the value and the ends of its interval."""
    if estimate is None or not math.isfinite(estimate.value):
        return "·" * width
    cells = ["·"] * width
    low, high = (_place(each, top, width) for each in _ends(estimate))
    for place in range(low, high + 1):
        cells[place] = "─"
    if low < high:
        cells[low], cells[high] = "├", "┤"
    cells[_place(estimate.value, top, width)] = "●"
    return "".join(cells)


def _ends(estimate: Estimate) -> tuple[float, float]:
    low = estimate.value if estimate.low is None else estimate.low
    return low, estimate.value if estimate.high is None else estimate.high


def _place(value: float, top: float, width: int) -> int:
    share = value / top if top > 0 else 0.0
    return round(min(max(share, 0.0), 1.0) * (width - 1))
