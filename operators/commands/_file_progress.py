"""What ``build --file`` shows while it runs: one operator after the other, or several at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from operators.core.progress import ProgressJson, ProgressLines, for_programs, make_bars, silent

if TYPE_CHECKING:
    from operators.recipes.run import TaskProgress
    from operators.recipes.tasks import BuildTask


@contextmanager
def progress_by_turns(tasks: Sequence[BuildTask], *, lines: bool) -> Iterator[TaskProgress]:
    """Of operators one after the other: two bars with the time left, of all and of the current one, on a terminal.

    Elsewhere lines about the current one, if ``lines``.
    """
    if for_programs():
        told = ProgressJson()

        def tell(_: BuildTask, what: str, done: int, total: int) -> None:
            told(what, done, total)

        yield tell
        return
    slow = [task.name for task in tasks if task.stored is None or task.calibrate]
    number = {name: index for index, name in enumerate(slow)}
    if not sys.stderr.isatty():
        say = ProgressLines() if lines else silent

        def report(task: BuildTask, what: str, done: int, total: int) -> None:
            say(f"{task.name} ({number[task.name] + 1} of {len(number)}): {what}", done, total)

        yield report
        return
    # The lines for people must not be drawn on stderr when stdout goes elsewhere.
    with make_bars(redirect_stdout=sys.stdout.isatty()) as bars:
        all_operators = bars.add_task("operators", total=len(number))
        current = bars.add_task("", total=None)

        def update(task: BuildTask, what: str, done: int, total: int) -> None:
            # How much of a calibration is done is not known: it counts several things one after another.
            share = 0.0 if task.calibrate else done / max(total, 1)
            bars.update(all_operators, completed=number[task.name] + share)
            description = f"{task.name}: {what}"
            if bars.tasks[current].description != description:
                # Its time left must not be estimated from what was counted before.
                bars.reset(current, description=description)
            bars.update(current, completed=done, total=total)

        yield update


@contextmanager
def joint_progress(tasks: Sequence[BuildTask], *, lines: bool) -> Iterator[TaskProgress]:
    """Of operators several at once: one bar or line, with the time left of all of them.

    It counts hundredths of operators, so that what is half done counts.
    """
    slow = [task for task in tasks if not task.is_up_to_date]
    shares: dict[str, float] = {}

    def hundredths(task: BuildTask, done: int, total: int) -> int:
        # How much of a calibration is done is not known; what a task counts anew does not take it back.
        share = 0.0 if task.calibrate else done / max(total, 1)
        shares[task.name] = max(share, shares.get(task.name, 0.0))
        return round(100 * sum(shares.values()))

    what, total = f"{len(slow)} operators (in hundredths)", 100 * len(slow)
    if for_programs() or not sys.stderr.isatty():
        say = ProgressJson() if for_programs() else ProgressLines() if lines else silent
        yield lambda task, _what, done, of: say(what, hundredths(task, done, of), total)
        return
    # Drawn when there is news, by no thread: this process is forked meanwhile.
    with make_bars(redirect_stdout=sys.stdout.isatty(), auto_refresh=False) as bars:
        bar = bars.add_task(what, total=total)
        yield lambda task, _what, done, of: bars.update(bar, completed=hundredths(task, done, of), refresh=True)
