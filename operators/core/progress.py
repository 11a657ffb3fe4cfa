"""What long computations report while they run, and the progress bars that show it.

With STEER_PROGRESS=json in the environment, lines of JSON on stderr take the place of bars and lines, for a program
that runs the command: {"stage": "Jacobian products", "done": 64, "total": 576, "seconds_left": 12.5}.
"""

from __future__ import annotations

import json
import os
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


def for_programs() -> bool:
    """Whether a program reads the progress, as lines of JSON."""
    return os.environ.get("STEER_PROGRESS") == "json"


@contextmanager
def shown_progress(*, lines: bool, clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """:func:`progress_bars`; where stderr is no terminal, :class:`ProgressLines` if ``lines``, and else nothing.

    :class:`ProgressJson` where a program reads it.
    """
    if for_programs():
        yield ProgressJson(clock=clock)
        return
    if lines and not sys.stderr.isatty():
        yield ProgressLines(clock=clock)
        return
    with progress_bars() as progress:
        yield progress


_MEASURED = 5.0
"""Seconds that a stage is measured before its time left is told: the pace of its first steps is not that of all."""


class ProgressLines:
    """Progress for a log: what is done and the time left, on stderr, at most a line in ``every`` seconds.

    What is done sooner than that has none.
    """

    _says_what_is_new = False

    def __init__(self, *, every: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = every, clock
        self._said = clock()
        self._began: dict[str, tuple[float, int]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Takes the progress of ``what``, and says it when it is time."""
        now = self._clock()
        # Where a computation goes on, or its first steps took no time, what was done before says nothing of its speed.
        is_new = what not in self._began
        began, first = self._began.setdefault(what, (now, done))
        if now - self._said < self._every and not (is_new and self._says_what_is_new):
            return
        self._said = now
        known = done > first and now - began >= _MEASURED
        self._say(what, done, total, (now - began) * (total - done) / (done - first) if known else None)

    def _say(self, what: str, done: int, total: int, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f", {_duration(seconds_left)} left"
        print(f"{what}: {done}/{total}{left}", file=sys.stderr, flush=True)


class ProgressJson(ProgressLines):
    """The same as lines of JSON, several in a second, and one for each new thing that is counted."""

    _says_what_is_new = True

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(every=0.2, clock=clock)

    def _say(self, what: str, done: int, total: int, seconds_left: float | None) -> None:
        print_stage(what, done=done, total=total, seconds_left=seconds_left)


def print_stage(stage: str, **counted: float | None) -> None:
    """A line of JSON on stderr."""
    print(json.dumps({"stage": stage, **counted}), file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """As the bars say it: hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


@contextmanager
def working(what: str) -> Iterator[None]:
    """Shows ``what`` with a moving sign on stderr while the block runs; nothing where stderr is no terminal."""
    if for_programs():
        print_stage(what)
        yield
        return
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(what)):
        yield
