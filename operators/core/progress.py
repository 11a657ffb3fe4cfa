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
def shown_progress(*, lines: bool, clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """:func:`progress_bars`; where stderr is no terminal, :class:`ProgressLines` if ``lines``, and else nothing."""
    if lines and not sys.stderr.isatty():
        yield ProgressLines(clock=clock)
        return
    with progress_bars() as progress:
        yield progress


class ProgressLines:
    """Progress for a log: what is done and the time left, on stderr, at most a line in ``every`` seconds.

    What is done sooner than that has none.
    """

    def __init__(self, *, every: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = every, clock
        self._said = clock()
        self._began: dict[str, tuple[float, int]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Takes the progress of ``what``, and says it when it is time."""
        now = self._clock()
        # Where a computation goes on, or its first steps took no time, what was done before says nothing of its speed.
        began, first = self._began.setdefault(what, (now, done))
        if now - self._said < self._every:
            return
        self._said = now
        left = f", {_duration((now - began) * (total - done) / (done - first))} left" if done > first else ""
        print(f"{what}: {done}/{total}{left}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """As the bars say it: hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


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
