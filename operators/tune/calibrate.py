"""Calibration: finds the setting at which an operator works best on its model, and writes it into the operator."""

from __future__ import annotations

from dataclasses import dataclass

from operators.builder.verify import check_compatible
from operators.core import capacity
from operators.core.artifact import OperatorArtifact, with_header
from operators.core.errors import BuildError
from operators.core.header import SETTING_FIELDS, Calibration, CalibrationPoint, Recommended
from operators.core.progress import Progress, silent
from operators.model.loading import LoadedModel
from operators.tune.calibration_spec import CalibrationSpec
from operators.tune.candidates import Example, trial_of
from operators.tune.form import Form
from operators.tune.journal import Journal
from operators.tune.operators_at_layers import OperatorsAtLayers, layers_to_try
from operators.tune.setting_search import search_settings


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What a calibration came to. Filled by :func:`calibrate_with_examples`."""

    artifact: OperatorArtifact
    examples: tuple[Example, ...]
    """Plain and steered texts of the first held-out prompts; none where nothing was found."""
    stronger: CalibrationPoint | None
    """The next stronger strength of the chosen form that was measured, whatever it did to the texts."""
    kept: bool
    """Whether the recommendation that was there stays: nothing was found, or nothing better than it."""


def calibrate(
    artifact: OperatorArtifact,
    loaded: LoadedModel,
    spec: CalibrationSpec,
    *,
    max_memory: int | None = None,
    progress: Progress = silent,
) -> OperatorArtifact:
    """The operator at the setting that works best: :func:`calibrate_with_examples` without what only people read.

    Raises:
        IncompatibleOperatorError: the model is not the one that the operator was built on.
        BuildError: the artifact is a lens, a layer does not exist, or there is too little memory.
        TrialError: a prompt has no tokens or too many.
        SteeringError: a candidate has no direction at some token.
    """
    return calibrate_with_examples(artifact, loaded, spec, max_memory=max_memory, progress=progress).artifact


def calibrate_with_examples(
    artifact: OperatorArtifact,
    loaded: LoadedModel,
    spec: CalibrationSpec,
    *,
    max_memory: int | None = None,
    journal: Journal | None = None,
    keep_better: bool = False,
    progress: Progress = silent,
) -> Calibrated:
    """The operator at the layer that works best, with all points of the search in its header.

    Where no setting beats the plain model within the bounds, ``header.calibration.chosen`` is None, and layer and
    recommendation are those of ``artifact``.

    Args:
        max_memory: bytes beside the model, for all candidates together and their texts; None means most of what is
            free.
        journal: what is measured is written there, and not measured again where it is there.
        keep_better: the recommendation that an earlier calibration found is measured too, and stays where it is best.

    Raises:
        IncompatibleOperatorError: the model is not the one that the operator was built on.
        BuildError: the artifact is a lens, a layer does not exist, or the candidates or their texts take more memory
            than there is.
        TrialError: a prompt has no tokens or too many.
        SteeringError: a candidate has no direction at some token.
    """
    check_compatible(artifact.header, loaded)
    if artifact.header.lens is not None:
        raise BuildError("a lens is not calibrated: its doses are measured where it is built")
    header = artifact.header
    layers = layers_to_try(artifact, loaded, spec)
    budget = capacity.free_memory(loaded.device) if max_memory is None else max_memory
    # The operator that is there, and the one that may be built at another layer.
    operators = OperatorsAtLayers(artifact, loaded, max_memory=max_memory)
    budget -= artifact.nbytes * min(len(layers), 2)
    incumbent = None if header.calibrated_point is None or not keep_better else header.calibrated_point
    calibration, examples = search_settings(
        operators,
        layers,
        loaded,
        spec,
        max_memory=budget,
        journal=Journal() if journal is None else journal,
        incumbent=incumbent,
        progress=progress,
    )
    if calibration.chosen is None:
        return Calibrated(with_header(artifact, calibration=calibration), (), None, kept=True)
    best = calibration.points[calibration.chosen]
    recommended = Recommended(**{name: getattr(best, name) for name in SETTING_FIELDS})
    found = with_header(operators.at(best.layer), recommended=recommended, calibration=calibration)
    kept = incumbent is not None and trial_of(best) == trial_of(incumbent)
    return Calibrated(found, examples, _stronger(calibration, best), kept=kept)


def _stronger(calibration: Calibration, best: CalibrationPoint) -> CalibrationPoint | None:
    above = [
        point
        for point in calibration.points
        if (point.layer, Form.of(point)) == (best.layer, Form.of(best)) and point.strength > best.strength
    ]
    return min(above, key=lambda point: (point.strength, -point.texts), default=None)
