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

from operators.commands import _describe as describe
from operators.commands import _output as output
from operators.commands._calibration import WORK, calibrate_new, forget
from operators.commands._options import BuildOptions, default_device, open_store, parse_memory, streaming_warnings
from operators.core.claims import claim
from operators.core.defaults import is_default
from operators.core.progress import ProgressJson, ProgressLines, for_programs, make_bars, silent, working

if TYPE_CHECKING:
    from operators.builder.spec import BuildSpec
    from operators.core.artifact import OperatorArtifact
    from operators.core.store import Store
    from operators.model.loading import LoadedModel
    from operators.recipes.run import BuildOutcome, TaskProgress
    from operators.recipes.tasks import BuildTask

_STATUSES = ("built", "updated", "up to date", "failed")


def build_file(file: Path, only: Sequence[str], options: BuildOptions) -> None:
    """Builds what the file describes, or the concepts ``only`` of it; exits with 1 where an operator failed."""
    start = time.monotonic()
    with output.exit_on_error(options.as_json):
        from operators.recipes.concept_file import read_concept_file, select_entries

        entries = read_concept_file(file)
        if only:
            entries = select_entries(entries, only)
        store, memory = open_store(options.store_path), parse_memory(options.max_memory)

        from operators.maps.detach import family_of
        from operators.model.loading import default_model, load_model
        from operators.recipes.run import run_tasks
        from operators.recipes.tasks import check_words, prepare_tasks

        if options.calibrate:
            check_words(entries, store)
        device = options.device or default_device()
        name = options.model or default_model()
        with working(f"loading {name}"):
            loaded = load_model(
                name,
                dtype=options.dtype,
                device=device,
                attention=options.attention,
                check=family_of,
                stream=options.may_stream,
            )
        output.print_warnings(streaming_warnings(loaded, options))
        tasks = prepare_tasks(
            entries, loaded, store, replace=options.replace, calibrate=options.calibrate, max_memory=memory
        )
        operators: list[dict[str, Any]] = []
        specs = {task.name: task.spec for task in tasks}
        width = max(len(task.name) for task in tasks)
        try:
            with _shown_progress(tasks, lines=not options.as_json) as progress:

                def calibrate(artifact: OperatorArtifact, task: BuildTask) -> OperatorArtifact:
                    # On the bars that exist: a second set of bars would write over these.
                    update = functools.partial(progress, task)
                    with claim(store, task.name, WORK):
                        return calibrate_new(
                            task.name,
                            artifact,
                            loaded,
                            store,
                            layers=task.layers,
                            quick=options.quick,
                            max_memory=memory,
                            progress=update,
                        )

                for outcome in run_tasks(
                    tasks, loaded, store, max_memory=memory, progress=progress, calibrate=calibrate
                ):
                    if outcome.status in ("built", "updated") and options.calibrate:
                        forget(store, outcome.name)
                    operators.append(_outcome_json(outcome, store, specs[outcome.name], loaded))
                    if not options.as_json:
                        print(output.printable(_outcome_line(operators[-1], width)), flush=True)
                    output.print_warnings(operators[-1]["warnings"], name=outcome.name)
        except KeyboardInterrupt:
            done = sum(operator["status"] != "failed" for operator in operators)
            print(
                f"{output.COMMAND}: stopped; {done} of {len(tasks)} operators are in {store.path}, "
                "and the same command builds the others",
                file=sys.stderr,
            )
            raise
    seconds = round(time.monotonic() - start, 2)
    counts = {status: sum(operator["status"] == status for operator in operators) for status in _STATUSES}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    answer = {"store": str(store.path), "model": loaded.name, "operators": operators, "seconds": seconds}
    output.print_answer(answer, [f"{summary}: {seconds} s, {store.path}"], as_json=options.as_json)
    if counts["failed"]:
        if not options.as_json:
            _print_problems(operators)
        raise typer.Exit(1)


def _print_problems(operators: Sequence[dict[str, Any]]) -> None:
    for operator in operators:
        if operator["status"] == "failed":
            problem = output.printable(f"{operator['name']}: {operator['problem']['message']}")
            print(f"{output.COMMAND}: {problem}", file=sys.stderr)


def _outcome_json(outcome: BuildOutcome, store: Store, spec: BuildSpec, loaded: LoadedModel) -> dict[str, Any]:
    # What is up to date was told of when it was built.
    told = outcome.status in ("built", "updated")
    common = {
        "name": outcome.name,
        "status": outcome.status,
        "seconds": round(outcome.seconds, 2),
        "warnings": describe.build_warnings(spec, loaded) if told else [],
    }
    if outcome.problem is not None:
        return {**common, "problem": output.error_json(outcome.problem)}
    assert outcome.stored is not None  # noqa: S101 - for the type checker
    header = outcome.stored.header
    return {
        **common,
        "digest": outcome.stored.digest,
        "path": str(store.path_of(outcome.name)),
        "layer": header.layer,
        "rank": header.low_rank.rank if header.low_rank else None,
        "reconstruction_error": header.reconstruction_error,
        "recommended": header.recommended.model_dump(mode="json"),
        "default": header.calibration is None and is_default(header.recommended),
        # None where there was no calibration.
        "found": None if header.calibration is None else header.calibration.chosen is not None,
    }


def _outcome_line(operator: dict[str, Any], width: int) -> str:
    line = f"{operator['name']:{width}}  {operator['status']:10}  {operator['seconds']:7.2f} s"
    if "problem" in operator:
        return f"{line}  {operator['problem']['message']}"
    recommended = operator["recommended"]
    if operator["found"] is None:
        shown = operator["default"] and operator["status"] != "up to date"
        return f"{line}  {describe.setting_line(recommended)} ({describe.DEFAULT_NOTE})" if shown else line
    result = "recommended" if operator["found"] else describe.nothing_found_line(recommended)
    return f"{line}  {result}: layer {operator['layer']}, {describe.setting_line(recommended)}"


@contextmanager
def _shown_progress(tasks: Sequence[BuildTask], *, lines: bool) -> Iterator[TaskProgress]:
    """Two bars with the time left, of all operators and of the current one, where stderr is a terminal.

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
