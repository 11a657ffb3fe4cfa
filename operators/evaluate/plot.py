"""A plot of an evaluation: useful hits over the distance from the plain model. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from operators.core.errors import TrialError
from operators.evaluate.form import CONTRAST
from operators.evaluate.summary import Figures, Summary
from operators.evaluate.tables import concept_sets


def draw(summary: Summary, path: Path) -> None:
    """Useful hits and hits over the measured p95 KL, a line per form through its doses; greedy, the shortest texts.

    Raises:
        TrialError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ModuleNotFoundError as error:
        raise TrialError("matplotlib is not installed; a plot needs its extra: pip install '.[analyse]'") from error
    run = summary.run
    title, concepts = next(iter(concept_sets(run).items()))
    regime, tokens = run["protocol"]["regimes"][0]["name"], run["protocol"]["lengths"][0]
    canvas = Canvas(figsize=(13, 6), layout="constrained")
    left, right = canvas.subplots(1, 2, sharex=True)
    lines: dict[str, list[Figures]] = {}
    for form, budget in summary.cells(regime):
        figures = summary.figures(form, regime, budget, tokens, concepts)
        if figures is not None and budget is not None:
            lines.setdefault(form, []).append(figures)
    for place, (form, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point.kl_p95)
        style = {"color": f"C{place % 10}", "linestyle": ("-", "--", ":")[place // 10 % 3], "marker": "o"}
        width = 3 if form == CONTRAST else 1.2
        doses = [point.kl_p95 for point in points]
        left.plot(doses, [point.useful.mean for point in points], label=form, linewidth=width, **style)
        right.plot(doses, [point.hits.mean for point in points], linewidth=width, **style)
    left.set_title(f"useful hits: {title}, {regime}, {tokens} tokens", fontsize="medium")
    right.set_title("hits", fontsize="medium")
    for axes in (left, right):
        axes.set_xlabel("measured 95th percentile of KL(plain || steered), nats per token")
        axes.set_xscale("log")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    canvas.legend(loc="outside right upper", fontsize="small")
    try:
        canvas.savefig(path, dpi=130)
    except OSError as error:
        raise TrialError(f"plot {path}: cannot be written: {error.strerror}") from error
