"""A calibration as commands run it: claimed, written down as it goes, and taken up again where it was stopped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from operators.commands import _output as output
from operators.core.version import __version__

if TYPE_CHECKING:
    from operators.core.artifact import OperatorArtifact
    from operators.core.progress import Progress
    from operators.core.store import Store
    from operators.model.loading import LoadedModel
    from operators.tune.calibrate import Calibrated
    from operators.tune.calibration_spec import CalibrationSpec
    from operators.tune.journal import Journal

WORK = "a calibration"
"""What a claim on the name says."""
_OF_THE_BUILD: Any = {
    "created": True,
    "recommended": True,
    "calibration": True,
    # Rounding, which no figure depends on.
    "reconstruction_error": True,
    "low_rank": {"residuals"},
}
"""Of a header: what differs when the same operator is built again, or says nothing about what it does."""


def journal_path(store: Store, name: str) -> Path:
    """Where the journal of a calibration of ``name`` is: a hidden file, since no operator has such a name."""
    return store.path / f".calibrate-{name}.jsonl"


def calibrate_in_store(
    name: str,
    artifact: OperatorArtifact,
    loaded: LoadedModel,
    spec: CalibrationSpec,
    store: Store,
    *,
    max_memory: int | None,
    keep_better: bool,
    progress: Progress,
) -> tuple[Calibrated, Journal]:
    """The calibrated operator, to be stored under ``name``, and the journal, to be deleted once it is.

    The caller holds the claim on ``name``. Where Ctrl-C ends it, says on stderr what is kept.
    """
    from operators.tune.calibrate import calibrate_with_examples
    from operators.tune.journal import Journal, journal_key

    facts = {key: str(value) for key, value in vars(spec).items()}
    header = artifact.header.model_dump(mode="json", exclude=_OF_THE_BUILD)
    key = journal_key(header=header, model=loaded.fingerprint, version=__version__, **facts)
    journal = Journal(journal_path(store, name), key)
    try:
        result = calibrate_with_examples(
            artifact,
            loaded,
            spec,
            max_memory=max_memory,
            journal=journal,
            keep_better=keep_better,
            progress=progress,
        )
    except KeyboardInterrupt:
        print(
            f"{output.COMMAND}: stopped; {journal.count} settings that were measured for {name!r} are kept in "
            f"{store.path}, and the same command goes on from there",
            file=sys.stderr,
        )
        raise
    return result, journal


def calibrate_new(
    name: str,
    artifact: OperatorArtifact,
    loaded: LoadedModel,
    store: Store,
    *,
    layers: tuple[int, ...] | None,
    quick: bool,
    max_memory: int | None,
    progress: Progress,
) -> OperatorArtifact:
    """A new operator, calibrated with the words that it was built with; everything not given has its default.

    The caller holds the claim on ``name``; the journal stays until it has stored the operator: :func:`forget`.
    """
    from operators.tune.calibration_spec import CalibrationSpec
    from operators.tune.prompts import calibration_prompts

    spec = CalibrationSpec(words=artifact.header.words, prompts=calibration_prompts(), layers=layers, quick=quick)
    result, _ = calibrate_in_store(
        name, artifact, loaded, spec, store, max_memory=max_memory, keep_better=False, progress=progress
    )
    return result.artifact


def forget(store: Store, name: str) -> None:
    """Removes the journal of a calibration that is stored."""
    journal_path(store, name).unlink(missing_ok=True)
