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
from typing import Literal

import torch

from operators.builder.build import BuildSpec, build_operator, check_layer, check_spec
from operators.builder.concept import concept_from_text
from operators.builder.stored import Stored, stored_already
from operators.core.artifact import OperatorArtifact, with_header
from operators.core.capacity import shortage_told
from operators.core.errors import ArtifactError, ConceptFileError, OperatorError, StoreError
from operators.core.header import OperatorHeader, Recommended
from operators.core.store import Store
from operators.maps.detach import family_of
from operators.maps.sketch import embedding_root
from operators.model.loading import LoadedModel
from operators.recipes.concept_entry import ConceptEntry
from operators.recipes.concept_file import FileEntry

_WORDS_NEEDED = "{}: key 'words' is needed for --calibrate: what shows the concept in a text"

Status = Literal["built", "up to date", "updated", "failed"]


@dataclass(frozen=True)
class Task:
    """One operator to see to. Filled by :func:`plan`."""

    name: str
    spec: BuildSpec
    stored: Stored | None
    """What is there and was built as ``spec`` says; None when it is to be built."""
    replace: bool
    """Whether it may take the place of what has its name."""
    calibrate: bool = False
    """Whether strength, rule and blend, which nobody said, are yet to be found by trial."""
    layers: tuple[int, ...] | None = None
    """Those that a calibration may try: the one that was asked for; None leaves it to the calibration."""

    @property
    def up_to_date(self) -> bool:
        """Whether nothing is to be done: what is there also recommends what ``spec`` does."""
        there = self.stored and (self.stored.header.recommended, self.stored.header.words)
        return not self.calibrate and there == (self.spec.recommended, self.spec.words)


@dataclass(frozen=True)
class Outcome:
    """What became of a task: an operator in the store, or an error. Filled by :func:`run`."""

    name: str
    status: Status
    seconds: float
    stored: Stored | None
    problem: OperatorError | None


Watcher = Callable[[Task, str, int, int], None]
"""Told, while an operator is made, what is being counted, and how many of how many are done."""

Calibrator = Callable[[OperatorArtifact, Task], OperatorArtifact]
"""Finds the setting at which an operator works best, at one of the task's layers."""


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
    store: Store,
    *,
    replace: bool = False,
    calibrate: bool = False,
    max_memory: int | None = None,
) -> tuple[Task, ...]:
    """What is to be done for every entry, after checking all that can be checked before the first is built.

    Args:
        store: where the operators go. Names in it that hold something else are an error, unless ``replace``.
        calibrate: whether settings that nobody said are to be found by trial, where that has not been done yet by the
            words that are asked for.
        max_memory: bytes beside the model; most of what is free when not given.

    Raises:
        UnsupportedModelError: the architecture has no detach table.
        StoreError: the store cannot be read.
        ConceptFileError: names every entry that this model or store refuses, and why.
    """
    family_of(loaded.model)
    store.names()
    tasks: list[Task] = []
    problems: list[str] = []
    for one in entries:
        try:
            tasks.append(_task(one, loaded, store, replace, calibrate, max_memory))
        except ConceptFileError as error:
            problems.extend(error.problems)
    if problems:
        # Once for all layers of a concept.
        raise ConceptFileError(*dict.fromkeys(problems))
    return tuple(tasks)


def check_words(entries: Sequence[FileEntry], store: Store) -> None:
    """What can be said before a model is loaded of entries that are to be calibrated.

    Raises:
        ConceptFileError: names every entry that has no words, neither in the file nor in the store.
    """
    wordless = [one for one in entries if _is_open(one.entry) and not one.entry.words]
    problems = [_WORDS_NEEDED.format(one.at("words")) for one in wordless if not _may_have_words(store, one.entry.name)]
    if problems:
        raise ConceptFileError(*dict.fromkeys(problems))


def run(
    tasks: Sequence[Task],
    loaded: LoadedModel,
    store: Store,
    *,
    max_memory: int | None = None,
    watch: Watcher | None = None,
    calibrate: Calibrator | None = None,
) -> Iterator[Outcome]:
    """Does the tasks one by one; each operator is in the store before its outcome is told.

    ``calibrate`` is needed where a task is to be calibrated.
    """
    # Once for all, where one needs it.
    root = functools.cache(lambda: embedding_root(loaded.model.get_input_embeddings().weight))
    for task in tasks:
        began = time.monotonic()
        if task.up_to_date:
            yield Outcome(task.name, "up to date", time.monotonic() - began, task.stored, None)
            continue
        try:
            done = _done(task, loaded, store, root, max_memory, watch, calibrate)
        except OperatorError as error:
            # The frames that it came through hold numbers whose memory the next build may need.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            yield Outcome(task.name, "failed", time.monotonic() - began, None, error)
            continue
        status: Status = "updated" if task.stored else "built"
        yield Outcome(task.name, status, time.monotonic() - began, done, None)


@shortage_told()
def _done(
    task: Task,
    loaded: LoadedModel,
    store: Store,
    root: Callable[[], torch.Tensor],
    max_memory: int | None,
    watch: Watcher | None,
    calibrate: Calibrator | None,
) -> Stored:
    if task.stored is not None:
        artifact = store.load(task.name)
        artifact = with_header(artifact, recommended=task.spec.recommended, words=task.spec.words)
    else:
        artifact = build_operator(
            task.spec,
            loaded,
            root=None if task.spec.rank == "full" else root(),
            max_memory=max_memory,
            progress=None if watch is None else functools.partial(watch, task, "Jacobian products"),
        )
    if task.calibrate:
        assert calibrate is not None  # noqa: S101 - for the type checker: who plans it brings it
        artifact = calibrate(artifact, task)
    store.save(task.name, artifact, replace=task.replace)
    return Stored(artifact.header, artifact.digest)


def _task(
    one: FileEntry, loaded: LoadedModel, store: Store, replace: bool, calibrate: bool, max_memory: int | None
) -> Task:
    with _told_at(one, "text", "texts"):
        spec = spec_of(one.entry, loaded)
    with _told_at(one, "layer", "layers", "profile"):
        layer = check_layer(spec.layer, spec.profile, loaded)
    with _told_at(one, "rank", "tolerance"):
        _, rank, _ = check_spec(spec, loaded, max_memory=max_memory)
    # What the defaults come to, so that it can be compared with what is stored.
    spec = dataclasses.replace(spec, layer=layer, rank=None if spec.tolerance is not None else rank or "full")
    with _told_at(one, "name"):
        there = stored_already(store, one.entry.name, spec, loaded, replace=replace, any_layer=one.entry.layer is None)
    found = None if there is None else there.header
    due = calibrate and _is_open(one.entry) and not _calibrated(found, one.entry)
    if found and one.entry.words is None:
        spec = dataclasses.replace(spec, words=found.words)
    if due and not spec.words:
        raise ConceptFileError(_WORDS_NEEDED.format(one.at("words")))
    if found and found.calibration and not due:
        # A calibration knows better than a default, whatever the words it was made by: it says which.
        spec = dataclasses.replace(spec, recommended=_recommended(one.entry, found.recommended))
    # A calibration begins where the file says, and not where one by other words has gone.
    kept = None if found and due and found.layer != spec.layer else there
    layers = None if one.entry.layer is None else (layer,)
    return Task(one.entry.name, spec, kept, replace or there is not None, due, layers)


def _is_open(entry: ConceptEntry) -> bool:
    """Whether nobody said at which strength, rule or blend it is to be used."""
    return entry.strength is None and entry.rule is None and entry.blend is None


def _calibrated(header: OperatorHeader | None, entry: ConceptEntry) -> bool:
    """Whether it has been calibrated by the words that are asked for; any, where nobody asks for some."""
    if header is None or header.calibration is None:
        return False
    return entry.words is None or entry.words == header.calibration.words


def _may_have_words(store: Store, name: str) -> bool:
    """Whether what is stored under this name could do without words of the file: it has some, or a calibration."""
    try:
        header = store.load(name).header
    except (ArtifactError, StoreError):
        return False
    return bool(header.words or header.calibration)


def _recommended(entry: ConceptEntry, otherwise: Recommended) -> Recommended:
    """What the entry says, and ``otherwise`` where it says nothing."""
    return Recommended(
        strength=otherwise.strength if entry.strength is None else entry.strength,
        rule=otherwise.rule if entry.rule is None else entry.rule,
        blend=otherwise.blend if entry.blend is None else entry.blend,
    )


@contextmanager
def _told_at(one: FileEntry, *keys: str) -> Iterator[None]:
    try:
        yield
    except OperatorError as error:
        raise ConceptFileError(f"{one.at(*keys)}: {error}") from error
