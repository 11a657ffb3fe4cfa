"""The plot of several models over many phrases."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from operators.analyse.canvas import Theme, ThemedImage, label, legible_log, render, short_name
from operators.analyse.results import STABLE_RANK_KINDS, ModelSummaries, StableRankKind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES: Mapping[StableRankKind, str] = MappingProxyType(
    {"first": "First position", "last": "Last position", "mean": "Mean over positions"}
)


def summary_plots(summaries: ModelSummaries) -> dict[str, ThemedImage]:
    """The plot of several models over many phrases, by name."""
    footer = f"{len(summaries.phrases)} phrases, output embedding of the last layer"
    width = max(9.6, 1.0 + 3 * 0.6 * len(summaries.models))

    def draw(figure: Figure, theme: Theme) -> None:
        _stable_ranks(figure, theme, summaries)

    return {"stable-ranks": render(draw, size=(width, 5.0), footer=footer)}


def _stable_ranks(figure: Figure, theme: Theme, summaries: ModelSummaries) -> None:
    panels = figure.subplots(1, 3)
    names = [label(short_name(model.model), longest=24) for model in summaries.models]
    columns = list(range(len(names)))
    for axes, kind, colour in zip(panels, STABLE_RANK_KINDS, theme.series, strict=True):
        for column, model in zip(columns, summaries.models, strict=True):
            values = sorted(model.stable_ranks(kind))
            # Offset sideways, by the order, so that points of one value do not hide one another.
            offsets = [column + 0.34 * (((7 * i) % 11) / 10 - 0.5) for i in range(len(values))]
            axes.scatter(offsets, values, s=16, alpha=0.6, color=colour, linewidths=0)
            if values:
                axes.boxplot(
                    [values],
                    positions=[column],
                    widths=0.5,
                    showfliers=False,
                    boxprops={"color": theme.ink},
                    whiskerprops={"color": theme.ink},
                    capprops={"color": theme.ink},
                    medianprops={"color": theme.ink, "linewidth": 2},
                )
        axes.set_yscale("log")
        legible_log(axes)
        axes.set_title(_TITLES[kind])
        axes.set_xticks(columns, names, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(visible=False, axis="x")
    panels[0].set_ylabel(r"stable rank $\|J\|_F^2 \, / \, \sigma_1^2$")
