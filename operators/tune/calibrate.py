"""Calibration: finds the setting at which an operator works best on its model, and writes it into the operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from operators.builder.build import build_operator
from operators.builder.concept import Concept
from operators.builder.spec import BuildSpec, resolve_layer
from operators.builder.verify import check_compatible
from operators.core import capacity
from operators.core.artifact import OperatorArtifact, with_header
from operators.core.errors import BuildError
from operators.core.header import Recommended
from operators.core.progress import Progress, silent
from operators.maps.sketch import embedding_root
from operators.model.loading import LoadedModel
from operators.tune.calibration_spec import CalibrationSpec
from operators.tune.setting_search import search_settings

_DEPTH_SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the depth at which layers are tried, beside the operator's own, when none are given."""


def calibrate(
    artifact: OperatorArtifact,
    loaded: LoadedModel,
    spec: CalibrationSpec,
    *,
    max_memory: int | None = None,
    progress: Progress = silent,
) -> OperatorArtifact:
    """The operator at the layer that works best, with all points of the search in its header.

    Where no setting beats the plain model within the bounds, ``header.calibration.chosen`` is None, and layer and
    recommendation are those of ``artifact``.

    Args:
        max_memory: bytes beside the model, for all candidates together and their texts; None means most of what is
            free.

    Raises:
        IncompatibleOperatorError: the model is not the one that the operator was built on.
        BuildError: a layer does not exist, or the candidates or their texts take more memory than there is.
        TrialError: a prompt has no tokens or too many.
        SteeringError: a candidate has no direction at some token.
    """
    check_compatible(artifact.header, loaded)
    if artifact.header.lens is not None:
        raise BuildError("a lens is not calibrated: its doses are measured where it is built")
    if artifact.header.vector is not None:
        # The anchor is all that there is of a vector: no rule and no other blend makes a difference.
        spec = dataclasses.replace(spec, rules=spec.rules[:1], blends=(1.0,))
    layers = candidate_layers(artifact, spec.layers)
    budget = capacity.free_memory(loaded.device) if max_memory is None else max_memory
    built = operators_at_layers(artifact, layers, loaded, max_memory=budget, progress=progress)
    operators = {operator.header.layer: operator for operator in built}
    budget -= sum(operator.nbytes for operator in operators.values())
    calibration = search_settings(operators, loaded, spec, max_memory=budget, progress=progress)
    if calibration.chosen is None:
        return with_header(artifact, calibration=calibration)
    best = calibration.points[calibration.chosen]
    recommended = Recommended(strength=best.strength, rule=best.rule, blend=best.blend)
    return with_header(operators[best.layer], recommended=recommended, calibration=calibration)


def candidate_layers(artifact: OperatorArtifact, requested: Sequence[int] | None) -> tuple[int, ...]:
    """The layers to try, in order: those requested; where None, the operator's own and six over the model's middle.

    Raises :class:`BuildError` for a vector and another layer than its own, the only one that it is of.
    """
    own = artifact.header.layer
    if artifact.header.vector is not None:
        for layer in requested or ():
            if layer != own:
                raise BuildError(f"layer {layer}: the operator is a vector of layer {own}, and not built at another")
        return (own,)
    if requested is not None:
        return tuple(sorted(set(requested)))
    depth = artifact.header.num_layers
    spread = {min(max(1, round(share * depth)), max(1, depth - 1)) for share in _DEPTH_SHARES}
    return tuple(sorted({own, *spread}))


def operators_at_layers(
    artifact: OperatorArtifact,
    layers: Sequence[int],
    loaded: LoadedModel,
    *,
    max_memory: int | None = None,
    progress: Progress = silent,
) -> Iterator[OperatorArtifact]:
    """Builds the concept of an operator at each of the layers: same texts, profile, rank, weighting and seed.

    ``max_memory``: bytes beside the model, for all of them together; None means that each build may use what is free.

    Raises:
        BuildError: a layer does not exist, or all operators together take more memory than there is.
    """
    header = artifact.header
    for layer in layers:
        resolve_layer(layer, header.profile, loaded)
    if max_memory is not None:
        # All of them are kept: while the last is built, the others take memory.
        kept = (len(layers) - 1) * artifact.nbytes
        if kept >= max_memory:
            raise BuildError(
                f"operators at {len(layers)} layers need more than {capacity.format_bytes(kept)} of memory beside the "
                f"model; {capacity.format_bytes(max_memory)} may be used (--max-memory; fewer layers or a lower rank "
                "need less)"
            )
        max_memory -= kept
    low = header.low_rank
    weighted = low is not None and low.weighting == "embedding"
    root = embedding_root(loaded.model.get_input_embeddings().weight) if weighted else None
    for done, layer in enumerate(layers):
        progress("operators built", done, len(layers))
        spec = BuildSpec(
            tuple(Concept(text.text, text.ids) for text in header.texts),
            header.profile,
            layer=layer,
            rank=None if header.tolerance else "full" if low is None else low.rank,
            tolerance=header.tolerance,
            weighting="embedding" if low is None else low.weighting,
            seed=0 if low is None else low.seed,
            recommended=header.recommended,
            words=header.words,
            weights=header.weights,
            members=header.members,
            neutral=header.neutral,
        )
        yield artifact if layer == header.layer else build_operator(spec, loaded, root=root, max_memory=max_memory)
