"""The report of a run: ``table.md``, ``figures.json`` and ``plot.png`` in the folder of its rows."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from operators.evaluate.journal import read_journal
from operators.evaluate.record import read_record, write_whole
from operators.evaluate.summary import Summary
from operators.evaluate.tables import concept_sets, report_markdown

TABLE, FIGURES, PLOT = "table.md", "figures.json", "plot.png"


def write_report(folder: Path) -> dict[str, Any]:
    """Makes the report anew from the rows; the plot only where matplotlib is installed. Returns the figures.

    Raises:
        TrialError: the folder has no run, no texts of it, or cannot be written to.
    """
    run = read_record(folder)
    summary = Summary(read_journal(folder), run)
    figures = {
        "model": run["model"],
        "layer": run["layer"],
        "digest": run["digest"],
        "concept_sets": concept_sets(run),
        "figures": [
            {"concepts_of": title, **asdict(found)}
            for title, concepts in concept_sets(run).items()
            for regime in run["protocol"]["regimes"]
            for tokens in run["protocol"]["lengths"]
            for form, budget in summary.cells(regime["name"])
            if (found := summary.figures(form, regime["name"], budget, tokens, concepts)) is not None
        ],
    }
    write_whole(folder / FIGURES, (json.dumps(figures, indent=1) + "\n").encode())
    write_whole(folder / TABLE, report_markdown(summary).encode())
    if find_spec("matplotlib") is not None:
        from operators.evaluate.plot import draw

        draw(summary, folder / PLOT)
    return figures
