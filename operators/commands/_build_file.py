"""``build --file``: every concept of a file in one run."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from operators.commands import _describe as describe
from operators.commands import _output as output
from operators.commands._calibration import calibrate_new, forget
from operators.commands._file_progress import joint_progress, progress_by_turns
from operators.commands._options import BuildOptions, default_device, open_store, parse_memory, streaming_warnings
from operators.core.built_at import built_at
from operators.core.defaults import is_default
from operators.core.progress import working

if TYPE_CHECKING:
    from operators.builder.spec import BuildSpec
    from operators.core.artifact import OperatorArtifact
    from operators.core.progress import Progress
    from operators.core.store import Store
    from operators.model.loading import LoadedModel
    from operators.recipes.concept_file import LocatedEntry
    from operators.recipes.run import BuildOutcome
    from operators.recipes.tasks import BuildTask
    from operators.recipes.workers import Prepared

_STATUSES = ("built", "updated", "up to date", "failed")


def build_file(file: Path, only: Sequence[str], options: BuildOptions) -> None:
    """Builds what the file describes, or the concepts ``only`` of it; exits with 1 where an operator failed."""
    start = time.monotonic()
    with output.exit_on_error(options.as_json):
        with output.wrong_usage():
            built_at()
        from operators.recipes.concept_file import read_concept_file, select_entries

        entries = read_concept_file(file)
        if only:
            entries = select_entries(entries, only)
        store = open_store(options.store_path)

        from operators.model.loading import default_model
        from operators.recipes.run import run_tasks
        from operators.recipes.tasks import check_words
        from operators.recipes.workers import prepare_apart, run_tasks_in_workers

        if options.calibrate:
            check_words(entries, store)
        prepare = functools.partial(_prepare, entries, store, options)
        shown = working(f"loading {options.model or default_model()}")
        if options.jobs > 1:
            prepared = prepare_apart(prepare, shown=shown)
        else:
            with shown:
                prepared = prepare()
        loaded, tasks, memory = prepared.loaded, prepared.tasks, prepared.max_memory
        output.print_warnings(streaming_warnings(loaded, options))
        operators: list[dict[str, Any]] = []
        specs = {task.name: task.spec for task in tasks}
        width = max(len(task.name) for task in tasks)
        calibrate = functools.partial(_calibrated, store=store, quick=options.quick, max_memory=memory)
        try:
            with ExitStack() as held:
                if options.jobs > 1:
                    progress = held.enter_context(joint_progress(tasks, lines=not options.as_json))
                    outcomes = run_tasks_in_workers(
                        prepared, store, jobs=options.jobs, progress=progress, calibrate=calibrate
                    )
                    # Its workers end with it, whatever ends this.
                    held.enter_context(closing(outcomes))
                else:
                    progress = held.enter_context(progress_by_turns(tasks, lines=not options.as_json))
                    outcomes = run_tasks(
                        tasks, loaded, store, max_memory=memory, progress=progress, calibrate=calibrate
                    )
                for outcome in outcomes:
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
    order = list(specs)
    operators.sort(key=lambda operator: order.index(operator["name"]))
    counts = {status: sum(operator["status"] == status for operator in operators) for status in _STATUSES}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    answer = {"store": str(store.path), "model": loaded.name, "operators": operators, "seconds": seconds}
    output.print_answer(answer, [f"{summary}: {seconds} s, {store.path}"], as_json=options.as_json)
    if counts["failed"]:
        if not options.as_json:
            _print_problems(operators)
        raise typer.Exit(1)


def _prepare(entries: Sequence[LocatedEntry], store: Store, options: BuildOptions) -> Prepared:
    """The model, and the tasks on it. All that asks for a CUDA device is in here: a process that has, cannot be forked.

    Raises :class:`OperatorError`, as loading a model and preparing the tasks do.
    """
    from operators.maps.detach import family_of
    from operators.model.loading import default_model, load_model
    from operators.recipes.tasks import prepare_tasks
    from operators.recipes.workers import Prepared, devices_of, root_for, share_of_memory

    memory, device = parse_memory(options.max_memory), options.device or default_device()
    loaded = load_model(
        options.model or default_model(),
        dtype=options.dtype,
        # Workers take it to their devices.
        device=device if options.jobs == 1 else "cpu",
        attention=options.attention,
        check=family_of,
        stream=options.may_stream,
        device_memory=parse_memory(options.device_memory),
    )
    devices = devices_of(device)
    if options.jobs > 1:
        memory = share_of_memory(memory, devices, options.jobs)
    tasks = prepare_tasks(
        entries, loaded, store, replace=options.replace, calibrate=options.calibrate, max_memory=memory
    )
    return Prepared(loaded, tasks, devices, memory, root_for(tasks, loaded) if options.jobs > 1 else None)


def _calibrated(
    artifact: OperatorArtifact,
    task: BuildTask,
    loaded: LoadedModel,
    progress: Progress,
    *,
    store: Store,
    quick: bool,
    max_memory: int | None,
) -> OperatorArtifact:
    """A :data:`~operators.recipes.run.Calibrator`. On the bars that exist: other ones would write over these."""
    return calibrate_new(
        task.name, artifact, loaded, store, layers=task.layers, quick=quick, max_memory=max_memory, progress=progress
    )


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
