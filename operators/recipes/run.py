"""Running the tasks of a file of concepts on one model: an operator that fails does not stop the others."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from operators.builder.build import build_operator
from operators.builder.stored import StoredOperator
from operators.core.artifact import OperatorArtifact, with_header
from operators.core.capacity import memory_errors_as_build_errors
from operators.core.errors import OperatorError
from operators.core.progress import silent
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

Calibrator = Callable[[OperatorArtifact, BuildTask], OperatorArtifact]
"""Returns the operator calibrated, at one of the task's layers."""


def run_tasks(
    tasks: Sequence[BuildTask],
    loaded: LoadedModel,
    store: Store,
    *,
    max_memory: int | None = None,
    progress: TaskProgress | None = None,
    calibrate: Calibrator | None = None,
) -> Iterator[BuildOutcome]:
    """Runs the tasks one by one; each operator is in the store before its outcome is yielded.

    Args:
        max_memory: bytes beside the model; None means most of what is free.
        calibrate: needed where a task is to be calibrated.
    """
    # Computed once, by the first task that needs it.
    root = functools.cache(lambda: embedding_root(loaded.model.get_input_embeddings().weight))
    for task in tasks:
        start = time.monotonic()
        stored, status = task.stored, _status(task)
        problem: OperatorError | None = None
        if not task.is_up_to_date:
            try:
                stored = _run_task(task, loaded, store, root, max_memory, progress, calibrate)
            except OperatorError as error:
                # The frames of its traceback hold tensors whose memory the next build may need.
                error.__traceback__ = error.__cause__ = error.__context__ = None
                stored, problem, status = None, error, "failed"
        yield BuildOutcome(task.name, status, time.monotonic() - start, stored, problem)


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
    if task.stored is not None:
        artifact = store.load(task.name)
        artifact = with_header(artifact, recommended=task.spec.setting_on(loaded), words=task.spec.words)
    else:
        artifact = build_operator(
            task.spec,
            loaded,
            root=None if task.spec.rank == "full" else root(),
            max_memory=max_memory,
            progress=silent if progress is None else functools.partial(progress, task),
        )
    if task.calibrate:
        assert calibrate is not None  # noqa: S101 - for the type checker; see run_tasks
        artifact = calibrate(artifact, task)
    store.save(task.name, artifact, replace=task.replace)
    return StoredOperator(artifact.header, artifact.digest)
