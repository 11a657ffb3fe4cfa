"""The plots of an analysis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from operators.analyse.canvas import Theme, ThemedImage, label, legible_log, render, short_name, token_axis
from operators.analyse.results import Analysis, Scope, SourcePosition, Target
from operators.analyse.tokens import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEGEND_LINES = 12
"""Positions that a legend has lines for; more get a colour bar."""
_TARGETS: tuple[tuple[Target, str, str], ...] = (
    ("block", "block $h^{(s)}$", "-"),
    ("attention", "attention $a^{(s)}$", "--"),
    ("mlp", "MLP $m^{(s)}$", "-."),
)


def analysis_plots(analysis: Analysis) -> dict[str, ThemedImage]:
    """Every plot of one prompt, by name."""
    footer = f"{short_name(analysis.model)}, {analysis.dtype}: “{visible(analysis.text).replace('␣', ' ')}”"
    width = min(11.5, max(9.0, 0.17 * len(analysis.positions) + 3))

    def image(draw: Callable[[Figure, Theme, Analysis], None], size: tuple[float, float]) -> ThemedImage:
        return render(lambda figure, theme: draw(figure, theme, analysis), size=size, footer=footer)

    return {
        "reconstruction": image(_reconstruction, (9.6, 4.7)),
        "spectra": image(_spectra, (9.6, 4.9)),
        "positions": image(_positions, (width, 5.8)),
        "emergence": image(_emergence, (9.6, 4.0)),
        "dimensions": image(_dimensions, (9.6, 6.6)),
        "stream": image(_stream, (9.6, 4.9)),
    }


def _reconstruction(figure: Figure, theme: Theme, analysis: Analysis) -> None:
    data = analysis.reconstruction
    values = [*data.target, *data.detached, *data.ordinary]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, reconstructed, name, error, colour in (
        (panels[0], data.detached, r"Detached map, $\Sigma_i\, J_i x_i + c$", data.detached_error, theme.series[0]),
        (panels[1], data.ordinary, r"Ordinary Jacobian, $\Sigma_i\, J_i x_i$", data.ordinary_error, theme.series[1]),
    ):
        axes.axline((0, 0), slope=1, color=theme.muted, linewidth=0.8, zorder=1)
        axes.scatter(data.target, reconstructed, s=11, alpha=0.7, color=colour, linewidths=0, zorder=2)
        axes.set_title(f"{name}\nrelative error {error:.2g}")
        axes.set_xlabel("component of the output embedding $h$")
        axes.set_aspect("equal", adjustable="box")
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(low - margin, high + margin)
    panels[0].set_ylabel("the same component, reconstructed")


def _spectra(figure: Figure, theme: Theme, analysis: Analysis) -> None:
    axes = figure.subplots()
    colours = _ordered(theme, len(analysis.positions))
    top = max(position.singular_values[0] for position in analysis.positions)
    for position, colour in zip(analysis.positions, colours, strict=True):
        values = position.singular_values
        axes.plot(
            range(1, len(values) + 1),
            values,
            color=colour,
            linewidth=1.6,
            label=f"{position.index}  {label(position.token.text)}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Smaller values are rounding.
    axes.set_ylim(bottom=max(top * 1e-7, 0.5 * min(p.singular_values[-1] for p in analysis.positions)))
    legible_log(axes)
    axes.set_xlabel("index $k$ of the singular value")
    axes.set_ylabel(r"singular value $\sigma_k$ of $J_i$")
    if len(analysis.positions) <= _LEGEND_LINES:
        figure.legend(loc="outside right upper", title="position $i$, token", alignment="left")
    else:
        _position_bar(figure, axes, theme, len(analysis.positions))


def _position_bar(figure: Figure, axes: Axes, theme: Theme, n: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    # 256 colours are the resolution of matplotlib's own maps.
    scale = ListedColormap(_ordered(theme, 256))
    figure.colorbar(ScalarMappable(Normalize(0, n - 1), scale), ax=axes, label="position $i$")


def _positions(figure: Figure, theme: Theme, analysis: Analysis) -> None:
    positions = analysis.positions
    ranks, shares = figure.subplots(2, 1, sharex=True)
    indices = range(len(positions))
    ranks.bar(indices, [_or_nan(p.stable_rank) for p in positions], color=theme.series[0], width=0.72)
    ranks.axhline(1, color=theme.muted, linewidth=0.8)
    ranks.set_title("Stable rank of $J_i$")
    ranks.set_ylabel(r"$\|J_i\|_F^2 \, / \, \sigma_1^2$")
    shares.bar(indices, [100 * p.share for p in positions], color=theme.series[1], width=0.72)
    shares.axhline(0, color=theme.muted, linewidth=0.8)
    shares.set_title("Share of the output embedding")
    shares.set_ylabel(r"$h \cdot J_i x_i \, / \, \|h\|^2$  (%)")
    shares.set_xlabel("token and its position $i$")
    for axes in (ranks, shares):
        token_axis(axes, [position.token.text for position in positions])
    ranks.tick_params(labelbottom=False)


def _emergence(figure: Figure, theme: Theme, analysis: Analysis) -> None:
    axes = figure.subplots()
    steps = [layer.index for layer in analysis.layers]
    sources: tuple[SourcePosition, ...] = ("last", "first")
    series = [[float(layer.lens_answer_rank) for layer in analysis.layers]]
    for source in sources:
        maps = [layer.map("cumulative", "block", source) for layer in analysis.layers]
        series.append([_or_nan(each.answer_rank) for each in maps])
    names = (
        "stream $h^{(s)}$, last position (logit lens)",
        "$u_1$ of the last position’s map",
        "$u_1$ of the first position’s map",
    )
    for values, name, colour, marker in zip(series, names, theme.series, "os^", strict=True):
        axes.plot(steps, values, color=colour, marker=marker, markersize=4, linewidth=1.5, label=name, clip_on=False)
    axes.set_yscale("log")
    axes.set_ylim(max(max(filter(math.isfinite, values), default=10) for values in series) * 1.3, 1)
    legible_log(axes)
    axes.set_title(f"Rank of the model’s next token {label(analysis.answer[0].text)} among all tokens (1 is the top)")
    axes.set_ylabel("rank (logarithmic)")
    _layer_axis(axes, len(steps))
    figure.legend(loc="outside upper left", ncols=3)


def _dimensions(figure: Figure, theme: Theme, analysis: Analysis) -> None:
    panels = figure.subplots(2, 2, sharex=True)
    steps = [layer.index for layer in analysis.layers]
    scopes: tuple[tuple[Scope, str], ...] = (
        ("cumulative", "from the embeddings to layer $s$"),
        ("single", "of layer $s$ alone"),
    )
    rows: tuple[tuple[SourcePosition, str], ...] = (("last", "last position"), ("first", "first position"))
    for row, (source, source_name) in enumerate(rows):
        for column, (scope, scope_name) in enumerate(scopes):
            axes = panels[row][column]
            for (target, name, dashes), colour in zip(_TARGETS, theme.series, strict=True):
                values = [_or_nan(layer.map(scope, target, source).stable_rank) for layer in analysis.layers]
                axes.plot(steps, values, dashes, color=colour, linewidth=1.7, label=name)
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.9)
            legible_log(axes)
            axes.set_title(f"Map {scope_name}, {source_name}")
        panels[row][0].set_ylabel(r"stable rank $\|J\|_F^2 \, / \, \sigma_1^2$")
    for axes in panels[1]:
        _layer_axis(axes, len(steps))
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=3)


def _stream(figure: Figure, theme: Theme, analysis: Analysis) -> None:
    norms, along = figure.subplots(1, 2)
    layers = analysis.layers
    blue, orange, green = theme.series
    maps = [layer.map("cumulative", "block", "last").along_final or (math.nan, math.nan) for layer in layers]
    cosines = [layer.along_final for layer in layers]
    _lines(
        norms,
        ("$h^{(s)}$, last position", "-", blue, [layer.norm_last for layer in layers]),
        ("$h^{(s)}$, first position", ":", blue, [layer.norm_first for layer in layers]),
        ("attention $a^{(s)}$, last", "--", orange, [layer.norm_attention for layer in layers]),
        ("MLP $m^{(s)}$, last", "-.", green, [layer.norm_mlp for layer in layers]),
    )
    norms.set_yscale("log")
    legible_log(norms)
    norms.set_title("Norms in the residual stream")
    norms.set_ylabel("Euclidean norm (units of the stream)")
    _lines(
        along,
        (r"$\cos(h^{(s)}, h^{(L)})$", "-", blue, cosines),
        (r"$|u_1^{(s)} \cdot u_1^{(L)}|$", "--", orange, [pair[0] for pair in maps]),
        (r"$|u_1^{(s)} \cdot u_2^{(L)}|$", "-.", green, [pair[1] for pair in maps]),
    )
    along.set_ylim(min(0.0, *cosines) - 0.02, 1.04)
    along.set_title("Projection on the last layer, last position")
    along.set_ylabel("cosine (1 is parallel)")


def _lines(axes: Axes, *series: tuple[str, str, str, list[float]]) -> None:
    """Draws (name, dashes, colour, values) as lines over the layers, with a legend below them."""
    for name, dashes, colour, values in series:
        axes.plot(range(1, len(values) + 1), values, dashes, color=colour, linewidth=1.7, label=name)
    _layer_axis(axes, len(series[0][3]))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _layer_axis(axes: Axes, num_layers: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer $s$")
    axes.set_xlim(0.5, num_layers + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))


def _ordered(theme: Theme, count: int) -> list[tuple[float, float, float, float]]:
    """``count`` colours (red, green, blue, opacity) for a series with an order."""
    from matplotlib import colormaps

    low, high = theme.order
    return [colormaps["viridis"](low + (high - low) * i / max(1, count - 1)) for i in range(count)]


def _or_nan(value: float | None) -> float:
    # matplotlib draws nothing for NaN.
    return math.nan if value is None else value
