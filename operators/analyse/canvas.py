"""How figures look and become PNG files: two themes, axes of tokens, labels that the font has glyphs for.

Only this module and the two of plots use matplotlib, through its objects and never through pyplot's global state.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from operators.analyse.tokens import visible
from operators.core.errors import AnalysisError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

DPI = 144
_MAX_TICK_LABELS = 40
_SHORT_LOG = 500
"""Ratio of an axis's ends below which powers of ten alone would be too few labels."""


@dataclass(frozen=True)
class Theme:
    """Colours: page, ink, secondary ink, grid, three series, and the range of viridis for an ordered series."""

    page: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, str, str]
    order: tuple[float, float]


LIGHT = Theme("#ffffff", "#1b1f24", "#5b6470", "#dfe3e8", ("#0b66b0", "#c8500a", "#0b7f5c"), (0.0, 0.88))
DARK = Theme("#14181d", "#e7eaee", "#9aa4b0", "#2d343c", ("#6cb6f5", "#f2a15c", "#4fcda6"), (0.22, 1.0))


@dataclass(frozen=True)
class ThemedImage:
    """One plot as PNG files: on a light and on a dark page."""

    light: bytes
    dark: bytes


def check_installed() -> None:
    """Raises :class:`AnalysisError` when there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise AnalysisError("matplotlib, which draws the plots, is not installed; install steering-operators[analyse]")


def render(draw: Callable[[Figure, Theme], None], *, size: tuple[float, float], footer: str) -> ThemedImage:
    """Draws one figure of ``size`` inches in both themes; ``footer`` is printed below."""
    light, places = _render(draw, size, footer, LIGHT, None)
    dark, _ = _render(draw, size, footer, DARK, places)
    return ThemedImage(light, dark)


def _render(
    draw: Callable[[Figure, Theme], None],
    size: tuple[float, float],
    footer: str,
    theme: Theme,
    places: Sequence[Bbox] | None,
) -> tuple[bytes, list[Bbox]]:
    """The figure as a PNG file, and the places of its axes, which take half of the time to work out.

    ``places`` are those that the same drawing got in another theme: colours take no room.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(theme)):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        # The footer has a strip at the bottom of its own.
        strip = 0.22 / size[1]
        engine = figure.get_layout_engine()
        if engine is not None:
            engine.set(rect=(0, strip, 1, 1 - strip))  # type: ignore[call-arg]
        figure.text(0.006, 0.25 * strip, _drawable(footer, 120), size=8, color=theme.muted)
        draw(figure, theme)
        if places is not None:
            figure.set_layout_engine("none")
            for axes, place in zip(figure.axes, places, strict=True):
                axes.set_position(place, which="original")
        file = io.BytesIO()
        # Not savefig, which draws a figure whose layout is to be worked out twice.
        # Without matplotlib's version in the metadata, the same numbers give the same bytes.
        canvas.print_png(file, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return file.getvalue(), [axes.get_position(original=True) for axes in figure.axes]


def _style(theme: Theme) -> Any:
    return {
        "figure.facecolor": theme.page,
        "axes.facecolor": theme.page,
        "savefig.facecolor": theme.page,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.edgecolor": theme.muted,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.labelsize": 10,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "font.family": "DejaVu Sans",
    }


def label(text: str, *, longest: int = 16) -> str:
    """A token or a name as a label: on one line, shortened, white space marked, what the font lacks escaped."""
    return _drawable(visible(text), longest)


def _drawable(text: str, longest: int) -> str:
    shortened = text if len(text) <= longest else f"{text[: longest - 1]}…"
    glyphs = _glyphs()
    drawn = "".join(c if ord(c) in glyphs else c.encode("unicode_escape").decode() for c in shortened)
    # Text between two dollars would be set as a formula.
    return drawn.replace("$", r"\$")


def short_name(model: str) -> str:
    """The last part of a model's name or path."""
    return PurePath(model).name or model


def token_axis(axes: Axes, texts: Sequence[str]) -> None:
    """Labels a horizontal axis of positions with tokens: every second, third, ... where there are many."""
    step = -(-len(texts) // _MAX_TICK_LABELS)
    labelled = list(range(0, len(texts), step))
    small = len(labelled) > 24
    axes.set_xticks(
        labelled,
        [f"{label(texts[i])}  {i}" for i in labelled],
        rotation=90 if small else 45,
        ha="center" if small else "right",
        rotation_mode="default" if small else "anchor",
        fontsize=7 if small else 9,
    )
    axes.set_xlim(-0.7, len(texts) - 0.3)
    axes.grid(visible=False, axis="x")


def legible_log(axes: Axes) -> None:
    """Labels 1, 2, 5, 10 on a logarithmic y axis that spans little, and powers of ten on one that spans much."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = sorted(axes.get_ylim())
    if high / low < _SHORT_LOG:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())
