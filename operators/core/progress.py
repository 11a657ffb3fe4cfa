"""What long computations report while they run, and the progress bars that show it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

Progress = Callable[[str, int, int], None]
"""Called with (what is counted, how many are done, how many there are)."""


def silent(_what: str, _done: int, _total: int) -> None:
    """Ignores the progress."""


_SPEED_PERIOD = 3600.0
"""Seconds that the time left is estimated from: a batch of texts may take minutes, and rich's 30 s would forget it."""


def make_bars(*, clock: Callable[[], float] | None = None, **options: Any) -> Bars:
    """Bars with the time left on stderr, for ``with``; nothing is drawn where stderr is no terminal.

    The time left is that of a total that stays: rich forgets the speed of a task whose total changes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        speed_estimate_period=_SPEED_PERIOD,
        get_time=clock,
        **{"console": Console(stderr=True), "disable": not sys.stderr.isatty(), "transient": True, **options},
    )


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Bars with the time left on stderr, one for each kind of thing counted; nothing where stderr is no terminal."""
    with make_bars() as bars:
        tasks: dict[str, TaskID] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update


@contextmanager
def shown_progress(*, every: float = 15.0) -> Iterator[Progress]:
    """:func:`progress_bars`; where stderr is no terminal, a line with the time left at most every so many seconds."""
    if sys.stderr.isatty():
        with progress_bars() as progress:
            yield progress
        return
    started: dict[str, tuple[float, int]] = {}
    last = 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        begin, first = started.setdefault(what, (now, done))
        if now - last < every and done < total:
            return
        last = now
        left = (now - begin) * (total - done) / (done - first) if done > first else None
        told = "" if left is None else f", {left:.0f} s left"
        print(f"{what}: {done}/{total}{told}", file=sys.stderr, flush=True)

    yield report


@contextmanager
def working(what: str) -> Iterator[None]:
    """Shows ``what`` with a moving sign on stderr while the block runs; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(what)):
        yield
