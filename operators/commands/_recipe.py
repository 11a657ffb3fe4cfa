"""``build --file``: every concept of a file in one run."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from operators.commands import _output as report
from operators.commands._options import (
    DeviceChoice,
    DTypeChoice,
    device_or_default,
    memory_or_default,
    open_store,
)

if TYPE_CHECKING:
    from operators.core.artifact import OperatorArtifact
    from operators.core.store import Store
    from operators.recipes.run import BuildOutcome, BuildTask, TaskProgress

_STATUSES = ("built", "updated", "up to date", "failed")


def build_file(
    file: Path,
    only: Sequence[str],
    *,
    model: str | None,
    dtype: DTypeChoice,
    device: DeviceChoice | None,
    store_path: Path | None,
    max_memory: str | None,
    replace: bool,
    calibrate: bool,
    as_json: bool,
) -> None:
    """Builds what the file asks for; exits with 1 where an operator failed."""
    start = time.monotonic()
    with report.reporting(as_json):
        from operators.recipes.concept_file import select_entries, read_concept_file

        entries = read_concept_file(file)
        if only:
            entries = select_entries(entries, only)
        store, budget = open_store(store_path), memory_or_default(max_memory)

        from operators.commands.calibrate import tuned
        from operators.model.loading import default_model, load_model
        from operators.recipes.run import check_words, prepare_tasks, run_tasks

        if calibrate:
            check_words(entries, store)
        loaded = load_model(model or default_model(), dtype=dtype, device=device_or_default(device))
        tasks = prepare_tasks(entries, loaded, store, replace=replace, calibrate=calibrate, max_memory=budget)
        told: list[dict[str, Any]] = []
        width = max(len(task.name) for task in tasks)
        try:
            with _progress(tasks) as watch:

                def tune(artifact: OperatorArtifact, task: BuildTask) -> OperatorArtifact:
                    # On the bars that are there: a second set of them would write over these.
                    progress = functools.partial(watch, task)
                    return tuned(artifact, loaded, layers=task.layers, max_memory=budget, progress=progress)

                for outcome in run_tasks(tasks, loaded, store, max_memory=budget, watch=watch, calibrate=tune):
                    told.append(_described(outcome, store))
                    if not as_json:
                        print(report.printable(_line(told[-1], width)), flush=True)
        except KeyboardInterrupt:
            done = sum(one["status"] != "failed" for one in told)
            print(
                f"{report.COMMAND}: stopped; {done} of {len(tasks)} operators are in {store.path}, "
                "and the same command builds the others",
                file=sys.stderr,
            )
            raise
    seconds = round(time.monotonic() - start, 2)
    counts = {status: sum(one["status"] == status for one in told) for status in _STATUSES}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    answer = {"store": str(store.path), "model": loaded.name, "operators": told, "seconds": seconds}
    report.tell(answer, [f"{summary}: {seconds} s, {store.path}"], as_json=as_json)
    if counts["failed"]:
        if not as_json:
            for one in told:
                if one["status"] == "failed":
                    said = report.printable(f"{one['name']}: {one['problem']['message']}")
                    print(f"{report.COMMAND}: {said}", file=sys.stderr)
        raise typer.Exit(1)


def _described(outcome: BuildOutcome, store: Store) -> dict[str, Any]:
    told: dict[str, Any] = {"name": outcome.name, "status": outcome.status, "seconds": round(outcome.seconds, 2)}
    if outcome.problem is not None:
        return {**told, "problem": report.problem(outcome.problem)}
    assert outcome.stored is not None  # noqa: S101 - for the type checker
    header = outcome.stored.header
    return {
        **told,
        "digest": outcome.stored.digest,
        "path": str(store.path_of(outcome.name)),
        "layer": header.layer,
        "rank": header.low_rank.rank if header.low_rank else None,
        "reconstruction_error": header.reconstruction_error,
        "recommended": header.recommended.model_dump(mode="json"),
        # None where nothing was looked for.
        "found": None if header.calibration is None else header.calibration.chosen is not None,
    }


def _line(told: dict[str, Any], width: int) -> str:
    line = f"{told['name']:{width}}  {told['status']:10}  {told['seconds']:7.2f} s"
    if "problem" in told:
        return f"{line}  {told['problem']['message']}"
    if told["found"] is None:
        return line
    setting = f"layer {told['layer']}, {report.setting(told['recommended'])}"
    said = "recommended" if told["found"] else report.nothing_found(told["recommended"])
    return f"{line}  {said}: {setting}"


@contextmanager
def _progress(tasks: Sequence[BuildTask]) -> Iterator[TaskProgress]:
    """Two bars with the time left, of all operators and of the one being made, where somebody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    slow = [task.name for task in tasks if task.stored is None or task.calibrate]
    number = {name: place for place, name in enumerate(slow)}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
        # What is printed on a stdout that is not the terminal does not belong there.
        redirect_stdout=sys.stdout.isatty(),
    ) as bars:
        every = bars.add_task("operators", total=len(number))
        one = bars.add_task("", total=None)

        def watch(task: BuildTask, what: str, done: int, total: int) -> None:
            # How long a calibration goes on after what is being counted is not known.
            share = 0.0 if task.calibrate else done / max(total, 1)
            bars.update(every, completed=number[task.name] + share)
            description = f"{task.name}: {what}"
            if bars.tasks[one].description != description:
                # Its time left is not judged by the one before.
                bars.reset(one, description=description)
            bars.update(one, completed=done, total=total)

        yield watch
