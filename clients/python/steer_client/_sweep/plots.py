"""Dose and response, drawn by matplotlib."""

from __future__ import annotations

from typing import Any

from steer_client._extras import need
from steer_client._sweep.chart import COLOURS, TITLES, Curves, bounds


def plot(drawn: Curves, axes: Any) -> Any:
    """The curves with their intervals, on these axes or on new ones. Returns the axes."""
    if axes is None:
        axes = need("matplotlib.pyplot", "plots").subplots(figsize=(6.4, 4.0), layout="constrained")[1]
    tried = [strength for each in drawn.points.values() for strength, _ in each]
    span = max(tried) - min(tried)
    for place, (name, points) in enumerate(drawn.points.items()):
        values = [estimate.value for _, estimate in points]
        ends = [bounds(estimate) for _, estimate in points]
        reach = [
            [value - low for value, (low, _) in zip(values, ends, strict=True)],
            [high - value for value, (_, high) in zip(values, ends, strict=True)],
        ]
        # matplotlib refuses what rounding made negative.
        reach = [[max(each, 0.0) for each in side] for side in reach]
        colour = COLOURS[place % len(COLOURS)]
        # Intervals of several operators stand beside one another.
        aside = 0.006 * span * (place - (len(drawn.points) - 1) / 2)
        strengths = [strength + aside for strength, _ in points]
        axes.errorbar(strengths, values, reach, marker="o", capsize=3, color=colour, label=_literal(name))
    if drawn.plain is not None:
        axes.axhline(drawn.plain, color="grey", linestyle="--", label="plain")
    axes.set_xlabel("strength λ")
    axes.set_ylabel(TITLES[drawn.metric])
    if drawn.metric in ("hits", "useful_hits"):
        axes.set_ylim(0, 1.02)
    else:
        axes.set_ylim(bottom=0)
    axes.legend()
    return axes


def _literal(name: str) -> str:
    # A label that begins with "_" is left out, and "$" would begin a formula.
    return "\u200b" + name.replace("$", r"\$")
