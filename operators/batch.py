"""Many operators on one model: what is there already stays, what fails does not stop the others.

:func:`plan` checks every entry against the model and the store before anything is built; :func:`run` builds.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from operators import store
from operators.artifact import OperatorArtifact, with_header
from operators.build import BuildSpec, build_operator, check_layer, check_spec
from operators.concept import concept_from_text
from operators.concept_entry import ConceptEntry
from operators.concept_file import FileEntry
from operators.detach import family_of
from operators.errors import BuildError, ConceptFileError, OperatorError
from operators.header import Recommended
from operators.models import LoadedModel
from operators.reduce import embedding_root
from operators.stored import Stored, stored_already

_CPU_IS_FULL = "can't allocate memory"
"""What torch says in a RuntimeError of no kind of its own."""

Status = Literal["built", "up to date", "updated", "failed"]


@dataclass(frozen=True)
class Task:
    """One operator to see to. Filled by :func:`plan`."""

    name: str
    spec: BuildSpec
    stored: Stored | None
    """What is there and was built as ``spec`` says; None when it is to be built."""
    fixed: bool
    """Whether somebody said at which strength, rule or blend it is to be used."""
    replace: bool
    """Whether it may take the place of what has its name."""

    @property
    def up_to_date(self) -> bool:
        """Whether what is there also recommends what ``spec`` does."""
        there = self.stored and (self.stored.header.recommended, self.stored.header.words)
        return there == (self.spec.recommended, self.spec.words)


@dataclass(frozen=True)
class Outcome:
    """What became of a task: an operator in the store, or an error. Filled by :func:`run`."""

    name: str
    status: Status
    seconds: float
    stored: Stored | None
    problem: OperatorError | None


Watcher = Callable[[Task, int, int], None]
"""Told, while an operator is built, how many columns of how many are done."""


def spec_of(entry: ConceptEntry, loaded: LoadedModel) -> BuildSpec:
    """What to build for an entry that is not in the store. Raises :class:`ConceptError`."""
    return BuildSpec(
        tuple(concept_from_text(text, loaded) for text in entry.texts),
        entry.profile or "residual",
        layer=entry.layer,
        rank=entry.rank,
        tolerance=entry.tolerance,
        words=entry.words or (),
        recommended=_recommended(entry, Recommended()),
    )


def plan(
    entries: Sequence[FileEntry],
    loaded: LoadedModel,
    where: Path,
    *,
    replace: bool = False,
    max_memory: int | None = None,
) -> tuple[Task, ...]:
    """What is to be done for every entry, after checking all that can be checked before the first is built.

    Args:
        where: the store. Names in it that hold something else are an error, unless ``replace``.
        max_memory: bytes beside the model; most of what is free when not given.

    Raises:
        UnsupportedModelError: the architecture has no detach table.
        StoreError: the store cannot be read.
        ConceptFileError: names every entry that this model or store refuses, and why.
    """
    family_of(loaded.model)
    store.names(where)
    tasks: list[Task] = []
    problems: list[str] = []
    for one in entries:
        try:
            tasks.append(_task(one, loaded, where, replace, max_memory))
        except ConceptFileError as error:
            problems.extend(error.problems)
    if problems:
        # Once for all layers of a concept.
        raise ConceptFileError(*dict.fromkeys(problems))
    return tuple(tasks)


def run(
    tasks: Sequence[Task],
    loaded: LoadedModel,
    where: Path,
    *,
    max_memory: int | None = None,
    watch: Watcher | None = None,
    calibrate: Callable[[OperatorArtifact], OperatorArtifact] | None = None,
) -> Iterator[Outcome]:
    """Does the tasks one by one; each operator is in the store before its outcome is told.

    ``calibrate`` is asked about every operator that has no calibration and whose setting nobody fixed.
    """
    root: torch.Tensor | None = None
    for task in tasks:
        began = time.monotonic()
        uncalibrated = calibrate is not None and not task.fixed and not (task.stored and task.stored.header.calibration)
        if task.up_to_date and not uncalibrated:
            yield Outcome(task.name, "up to date", time.monotonic() - began, task.stored, None)
            continue
        try:
            if task.stored is not None:
                artifact = _rewritten(store.load(where, task.name), task.spec)
            else:
                if root is None and task.spec.rank != "full":
                    root = embedding_root(loaded.model.get_input_embeddings().weight)
                artifact = _built(task, loaded, root, max_memory, watch)
            if calibrate is not None and uncalibrated:
                artifact = calibrate(artifact)
            store.save(where, task.name, artifact, replace=task.replace)
        except OperatorError as error:
            yield Outcome(task.name, "failed", time.monotonic() - began, None, error)
            continue
        status: Status = "updated" if task.stored else "built"
        done = Stored(artifact.header, artifact.digest)
        # Its numbers take memory that the next build may need.
        del artifact
        yield Outcome(task.name, status, time.monotonic() - began, done, None)


def _task(one: FileEntry, loaded: LoadedModel, where: Path, replace: bool, max_memory: int | None) -> Task:
    with _told_at(one, "text", "texts"):
        spec = spec_of(one.entry, loaded)
    with _told_at(one, "layer", "layers", "profile"):
        layer = check_layer(spec.layer, spec.profile, loaded)
    with _told_at(one, "rank", "tolerance"):
        _, rank, _ = check_spec(spec, loaded, max_memory=max_memory)
    # What the defaults come to, so that it can be compared with what is stored.
    spec = dataclasses.replace(spec, layer=layer, rank=None if spec.tolerance is not None else rank or "full")
    with _told_at(one, "name"):
        there = stored_already(where, one.entry.name, spec, loaded, replace=replace, any_layer=one.entry.layer is None)
    fixed = any(value is not None for value in (one.entry.strength, one.entry.rule, one.entry.blend))
    if there is None:
        return Task(one.entry.name, spec, None, fixed, replace)
    kept = dataclasses.replace(
        spec,
        words=there.header.words if one.entry.words is None else one.entry.words,
        # A calibration knows better than a default.
        recommended=_recommended(one.entry, there.header.recommended if there.header.calibration else Recommended()),
    )
    return Task(one.entry.name, kept, there, fixed, replace=True)


def _recommended(entry: ConceptEntry, otherwise: Recommended) -> Recommended:
    """What the entry says, and ``otherwise`` where it says nothing."""
    return Recommended(
        strength=otherwise.strength if entry.strength is None else entry.strength,
        rule=otherwise.rule if entry.rule is None else entry.rule,
        blend=otherwise.blend if entry.blend is None else entry.blend,
    )


def _built(
    task: Task, loaded: LoadedModel, root: torch.Tensor | None, max_memory: int | None, watch: Watcher | None
) -> OperatorArtifact:
    progress = None if watch is None else functools.partial(watch, task)
    try:
        return build_operator(task.spec, loaded, root=root, max_memory=max_memory, progress=progress)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU_IS_FULL in str(error)):
            raise
        raise BuildError("there is not enough memory; a lower rank, or a smaller --max-memory, needs less") from error


def _rewritten(artifact: OperatorArtifact, spec: BuildSpec) -> OperatorArtifact:
    changed: dict[str, object] = {"recommended": spec.recommended, "words": spec.words}
    if spec.words and spec.words != artifact.header.words:
        # What was measured was measured with other words.
        changed["calibration"] = None
    return with_header(artifact, **changed)


@contextmanager
def _told_at(one: FileEntry, *keys: str) -> Iterator[None]:
    try:
        yield
    except OperatorError as error:
        raise ConceptFileError(f"{one.at(*keys)}: {error}") from error
