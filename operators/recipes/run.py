"""Running the tasks of a file of concepts on one model: an operator that fails does not stop the others."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from operators.builder.build import build_operator
from operators.builder.stored import StoredOperator, find_up_to_date
from operators.core.artifact import OperatorArtifact, with_header
from operators.core.capacity import memory_errors_as_build_errors
from operators.core.claims import claim_if_free, in_use
from operators.core.errors import OperatorError
from operators.core.progress import Progress, silent
from operators.core.store import Store
from operators.maps.sketch import embedding_root
from operators.model.loading import LoadedModel
from operators.recipes.tasks import BuildTask

Status = Literal["built", "up to date", "updated", "failed"]


@dataclass(frozen=True)
class BuildOutcome:
    """What became of a task: an operator in the store, or an error. Filled by :func:`run_tasks`."""

    name: str
    status: Status
    seconds: float
    stored: StoredOperator | None
    """None where it failed."""
    problem: OperatorError | None
    """None where it did not fail."""


TaskProgress = Callable[[BuildTask, str, int, int], None]
"""Called while a task runs with (task, what is counted, how many are done, how many there are)."""

Calibrator = Callable[[OperatorArtifact, BuildTask, LoadedModel, Progress], OperatorArtifact]
"""Returns the operator calibrated, at one of the task's layers."""

BUILD = "a build of a file"
"""What the claim on an operator's name says while its task runs."""
WAIT = 0.5
"""Seconds until an operator is looked at again that another process is at work on."""


def run_tasks(
    tasks: Sequence[BuildTask],
    loaded: LoadedModel,
    store: Store,
    *,
    max_memory: int | None = None,
    progress: TaskProgress | None = None,
    calibrate: Calibrator | None = None,
) -> Generator[BuildOutcome, None, None]:
    """Runs the tasks one by one; each operator is in the store before its outcome is yielded.

    What another process is building, by this function on the same store, is left to it, and waited for at the end.

    Args:
        max_memory: bytes beside the model; None means most of what is free.
        calibrate: needed where a task is to be calibrated.
    """
    # Computed once, by the first task that needs it.
    root = functools.cache(lambda: embedding_root(loaded.model.get_input_embeddings().weight))
    waiting = deque(tasks)
    while waiting:
        task = waiting.popleft()
        outcome = run_task(task, loaded, store, root, max_memory, progress, calibrate)
        if outcome is None:
            waiting.append(task)
            time.sleep(WAIT)
        else:
            yield outcome


def run_task(
    task: BuildTask,
    loaded: LoadedModel,
    store: Store,
    root: Callable[[], torch.Tensor],
    max_memory: int | None,
    progress: TaskProgress | None,
    calibrate: Calibrator | None,
) -> BuildOutcome | None:
    """One of the tasks of :func:`run_tasks`; None where another process is at work on it.

    Args:
        root: gives C^{1/2} of :func:`~operators.maps.sketch.embedding_root`, of which there is one for all tasks.
    """
    start = time.monotonic()
    stored, status = task.stored, _status(task)
    problem: OperatorError | None = None
    if not task.is_up_to_date:
        try:
            with claim_if_free(store, task.name, BUILD) as holder:
                # One that has not said yet what it is will have when it is asked again.
                if holder is not None and (not holder or holder.startswith(BUILD)):
                    return None
                if holder is not None:
                    raise in_use(store, task.name, holder)
                task = _since_prepared(task, loaded, store)
                status = _status(task)
                if task.is_up_to_date:
                    stored = task.stored
                else:
                    stored = _run_task(task, loaded, store, root, max_memory, progress, calibrate)
        except OperatorError as error:
            # The frames of its traceback hold tensors whose memory the next build may need.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            stored, problem, status = None, error, "failed"
    return BuildOutcome(task.name, status, time.monotonic() - start, stored, problem)


def _since_prepared(task: BuildTask, loaded: LoadedModel, store: Store) -> BuildTask:
    """The task, less what another process has done of it since it was prepared.

    Raises :class:`StoreError` where another operator has the name by now that may not be replaced.
    """
    if task.name not in store or (task.stored is not None and not task.calibrate):
        return task
    found = find_up_to_date(
        store, task.name, task.spec, loaded, replace=task.replace, layer_is_default=task.layers is None
    )
    if not task.calibrate:
        return dataclasses.replace(task, stored=found)
    calibration = None if found is None else found.header.calibration
    if found is None or calibration is None or calibration.words != task.spec.words:
        return task
    # What it recommends is what the other's calibration found.
    spec = dataclasses.replace(task.spec, recommended=found.header.recommended, words=found.header.words)
    return dataclasses.replace(task, spec=spec, stored=found, calibrate=False)


def _status(task: BuildTask) -> Status:
    """The status of the task where it does not fail."""
    if task.is_up_to_date:
        return "up to date"
    return "updated" if task.stored else "built"


@memory_errors_as_build_errors()
def _run_task(
    task: BuildTask,
    loaded: LoadedModel,
    store: Store,
    root: Callable[[], torch.Tensor],
    max_memory: int | None,
    progress: TaskProgress | None,
    calibrate: Calibrator | None,
) -> StoredOperator:
    told = silent if progress is None else functools.partial(progress, task)
    if task.stored is not None:
        artifact = store.load(task.name)
        artifact = with_header(artifact, recommended=task.spec.setting_on(loaded), words=task.spec.words)
    else:
        artifact = build_operator(
            task.spec,
            loaded,
            root=None if task.spec.rank == "full" else root(),
            max_memory=max_memory,
            progress=told,
        )
    if task.calibrate:
        assert calibrate is not None  # noqa: S101 - for the type checker; see run_tasks
        artifact = calibrate(artifact, task, loaded, told)
    store.save(task.name, artifact, replace=task.replace)
    return StoredOperator(artifact.header, artifact.digest)
