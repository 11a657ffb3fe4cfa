"""How far a sweep is, for people at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, done: int, *, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes how many texts were finished. `shown`: None shows it on a terminal alone."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda _: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("· left"),
        progress.TimeRemainingColumn(),
    )
    # The pace is that of this whole run: what an earlier one left in the file does not count, and requests that end
    # together do not make it jump.
    with progress.Progress(*columns, console=Console(stderr=True), speed_estimate_period=float("inf")) as bar:
        task = bar.add_task("texts", total=total, completed=done)
        yield lambda texts: bar.advance(task, texts)
