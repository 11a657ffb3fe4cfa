"""A plot of the curves of a calibration. Needs matplotlib, which is an optional dependency."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from operators.core.errors import TrialError
from operators.core.header import Calibration, CalibrationPoint, Rule

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_format(path: Path) -> None:
    """Raises :class:`TrialError` for a file ending that is no format of pictures, or without matplotlib."""
    accepted = sorted(_matplotlib().figure.Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in accepted:
        raise TrialError(f"plot {path}: its ending is {path.suffix!r}; accepted: {', '.join(accepted)}")


def draw_calibration(curves: Calibration, name: str, path: Path) -> None:
    """Plots hit rate and perplexity ratio over p95 KL, one line per layer, rule and blend.

    Raises:
        TrialError: matplotlib is not installed, or the file cannot be written.
    """
    figure = _matplotlib().figure.Figure(figsize=(11, 4.5), layout="constrained")
    hits, fluency = figure.subplots(1, 2)
    series: dict[tuple[int, Rule, float], list[CalibrationPoint]] = {}
    for point in curves.points:
        # Only points on all prompts are drawn: those of the first round are coarse.
        if point.texts == curves.prompts:
            series.setdefault((point.layer, point.rule, point.blend), []).append(point)
    for (layer, rule, blend), points in series.items():
        points.sort(key=lambda point: point.kl_p95)
        label = f"layer {layer}, " + ("anchor" if blend == 1.0 else f"{rule}, blend {blend:g}")
        distances = [point.kl_p95 for point in points]
        hits.plot(distances, [point.hit_rate for point in points], marker="o", label=label)
        fluency.plot(distances, [point.perplexity_ratio for point in points], marker="o", label=label)
    hits.axhline(curves.plain_hit_rate, color="grey", linestyle=":", label="plain")
    fluency.axhline(curves.max_perplexity_ratio, color="grey", linestyle="--", label="bound")
    if curves.chosen is not None:
        best = curves.points[curves.chosen]
        hits.plot(best.kl_p95, best.hit_rate, marker="*", markersize=18, color="black", linestyle="", label="chosen")
        fluency.plot(best.kl_p95, best.perplexity_ratio, marker="*", markersize=18, color="black", linestyle="")
    _label(hits, curves, f"{name}: share of texts with one of its words")
    _label(fluency, curves, "perplexity under the plain model / that of plain texts")
    hits.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise TrialError(f"plot {path}: cannot be written: {error.strerror}") from error


def _label(axes: Axes, curves: Calibration, title: str) -> None:
    axes.axvline(curves.kl_budget, color="grey", linestyle="--")
    axes.set_xlabel("95th percentile of KL(plain || steered), nats per token")
    axes.set_title(title, fontsize="medium")


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise TrialError("matplotlib is not installed; a plot needs its extra: pip install '.[analyse]'") from error
    return matplotlib
