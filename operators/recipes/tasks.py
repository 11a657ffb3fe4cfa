"""What is to be done for each entry of a file of concepts, checked against the model and the store beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec, check_first_token, resolve_layer, resolve_spec
from operators.builder.stored import StoredOperator, find_up_to_date
from operators.core.defaults import default_recommended
from operators.core.errors import ArtifactError, ConceptFileError, OperatorError, StoreError
from operators.core.header import SETTING_FIELDS, OperatorHeader, Recommended
from operators.core.store import Store
from operators.maps.detach import family_of
from operators.model.loading import LoadedModel
from operators.recipes.concept_entry import ConceptEntry
from operators.recipes.concept_file import LocatedEntry

_WORDS_NEEDED = "{}: key 'words' is needed for --calibrate: what shows the concept in a text"


@dataclass(frozen=True)
class BuildTask:
    """One operator to build, update or leave. Filled by :func:`prepare_tasks`."""

    name: str
    spec: BuildSpec
    """With what it recommends."""
    stored: StoredOperator | None
    """The operator in the store, where it is the one that ``spec`` builds; None means that it must be built."""
    replace: bool
    """Whether an operator of that name may be replaced."""
    calibrate: bool = False
    """Whether the setting is to be found by a calibration: the entry leaves all of it open."""
    layers: tuple[int, ...] | None = None
    """The layers that the calibration may try: the one that was given; None means the calibration's default."""

    @property
    def is_up_to_date(self) -> bool:
        """Whether nothing is to be done: the stored operator also has the words and the recommendation of ``spec``."""
        if self.calibrate or self.stored is None:
            return False
        header = self.stored.header
        return (header.recommended, header.words) == (self.spec.recommended, self.spec.words)


def build_spec(entry: ConceptEntry, loaded: LoadedModel) -> BuildSpec:
    """What to build for an entry, whatever is in the store. Raises :class:`ConceptError`."""
    return BuildSpec(
        tuple(concept_from_text(text, loaded) for text in entry.texts),
        entry.profile or "residual",
        layer=entry.layer,
        rank=entry.rank,
        tolerance=entry.tolerance,
        words=entry.words or (),
        recommended=recommended_of(entry, type(loaded.model).__name__),
    )


def prepare_tasks(
    entries: Sequence[LocatedEntry],
    loaded: LoadedModel,
    store: Store,
    *,
    replace: bool = False,
    calibrate: bool = False,
    max_memory: int | None = None,
) -> tuple[BuildTask, ...]:
    """One task per entry, after checking all that can be checked before the first operator is built.

    Args:
        store: where the operators go. A different operator under one of the names is an error, unless ``replace``.
        calibrate: whether settings that an entry leaves open are to be found by a calibration; a stored operator that
            was already calibrated with the entry's words is left as it is.
        max_memory: bytes beside the model; None means most of what is free.

    Raises:
        UnsupportedModelError: the architecture has no detach table.
        StoreError: the store cannot be read.
        ConceptFileError: names every entry that this model or store refuses, and why.
    """
    family_of(loaded.model)
    store.names()
    tasks: list[BuildTask] = []
    problems: list[str] = []
    for entry in entries:
        try:
            tasks.append(_prepare_task(entry, loaded, store, replace, calibrate, max_memory))
        except ConceptFileError as error:
            problems.extend(error.problems)
    if problems:
        # A problem that all layers of a concept share is reported once.
        raise ConceptFileError(*dict.fromkeys(problems))
    return tuple(tasks)


def check_words(located: Sequence[LocatedEntry], store: Store) -> None:
    """Checks before a model is loaded that every entry to be calibrated has words, in the file or in the store.

    Raises:
        ConceptFileError: names every entry that has none.
    """
    wordless = [one for one in located if _leaves_setting_open(one.entry) and not one.entry.words]
    problems = [
        _WORDS_NEEDED.format(one.at("words")) for one in wordless if not _has_stored_words(store, one.entry.name)
    ]
    if problems:
        raise ConceptFileError(*dict.fromkeys(problems))


def _prepare_task(
    located: LocatedEntry, loaded: LoadedModel, store: Store, replace: bool, calibrate: bool, max_memory: int | None
) -> BuildTask:
    entry = located.entry
    spec = _resolved_spec(located, loaded, max_memory)
    with _errors_located_at(located, "name"):
        stored = find_up_to_date(store, entry.name, spec, loaded, replace=replace, layer_is_default=entry.layer is None)
    header = None if stored is None else stored.header
    calibration_due = calibrate and _leaves_setting_open(entry) and not _is_calibrated(header, entry)
    if header and entry.words is None:
        spec = dataclasses.replace(spec, words=header.words)
    if calibration_due and not spec.words:
        raise ConceptFileError(_WORDS_NEEDED.format(located.at("words")))
    if header and header.calibration and not calibration_due:
        # A calibrated setting is better than a default one, whatever the words of the calibration: the header has them.
        spec = dataclasses.replace(spec, recommended=header.recommended.model_copy(update=_given(entry)))
    # A calibration starts at the layer of the file, and not at the one to which a calibration with other words moved.
    moved = header is not None and calibration_due and header.layer != spec.layer
    return BuildTask(
        name=entry.name,
        spec=spec,
        stored=None if moved else stored,
        replace=replace or stored is not None,
        calibrate=calibration_due,
        layers=None if entry.layer is None else (entry.layer,),
    )


def _resolved_spec(located: LocatedEntry, loaded: LoadedModel, max_memory: int | None) -> BuildSpec:
    """What to build, with the layer and rank that the defaults come to: a stored operator is compared with it."""
    with _errors_located_at(located, "text", "texts"):
        spec = build_spec(located.entry, loaded)
    with _errors_located_at(located, "first_token", "positions"):
        check_first_token(spec.setting_on(loaded))
    with _errors_located_at(located, "layer", "layers", "profile"):
        layer = resolve_layer(spec.layer, spec.profile, loaded)
    with _errors_located_at(located, "rank", "tolerance"):
        rank = resolve_spec(spec, loaded, max_memory=max_memory).rank
    return dataclasses.replace(spec, layer=layer, rank=None if spec.tolerance is not None else rank or "full")


def _leaves_setting_open(entry: ConceptEntry) -> bool:
    """Whether nothing of the setting is given."""
    return not _given(entry)


def _is_calibrated(header: OperatorHeader | None, entry: ConceptEntry) -> bool:
    """Whether a stored operator was calibrated with the entry's words; with any words where the entry has none."""
    if header is None or header.calibration is None:
        return False
    return entry.words is None or entry.words == header.calibration.words


def _has_stored_words(store: Store, name: str) -> bool:
    """Whether the stored operator of that name has words or a calibration, so that the file needs no words."""
    try:
        header = store.load(name).header
    except (ArtifactError, StoreError):
        return False
    return bool(header.words or header.calibration)


def recommended_of(entry: ConceptEntry, architecture: str) -> Recommended:
    """What an entry recommends, whatever is in the store: its own setting, and defaults for what it leaves open."""
    given = _given(entry)
    return default_recommended(entry.profile or "residual", architecture, given).model_copy(update=given)


def _given(entry: ConceptEntry) -> dict[str, object]:
    """The fields of the setting that the entry decides."""
    return {name: getattr(entry, name) for name in SETTING_FIELDS if getattr(entry, name) is not None}


@contextmanager
def _errors_located_at(located: LocatedEntry, *keys: str) -> Iterator[None]:
    """Turns an error of the block into one that begins with file, line and concept."""
    try:
        yield
    except OperatorError as error:
        raise ConceptFileError(f"{located.at(*keys)}: {error}") from error
