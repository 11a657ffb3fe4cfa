"""One concept's operators at several layers, or their anchors alone, and which layers are worth a look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch

from operators.builder.build import build_operator
from operators.builder.concept import Concept
from operators.builder.neutral import last_target, neutral_mean, tokenise_neutral
from operators.builder.spec import BuildSpec, resolve_layer
from operators.core.apply import PreparedOperator, prepare
from operators.core.artifact import OperatorArtifact
from operators.core.errors import BuildError
from operators.core.header import injection_layer
from operators.model.loading import LoadedModel
from operators.tune.accessibility import accessibility
from operators.tune.calibration_spec import CalibrationSpec
from operators.tune.candidates import PlacedOperator

_DEPTH_SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the depth at which layers are looked at, beside the operator's own, when none are given."""


class OperatorsAtLayers:
    """The operator itself, and what is built of its concept at other layers, once for each."""

    def __init__(self, artifact: OperatorArtifact, loaded: LoadedModel, *, max_memory: int | None = None) -> None:
        """``max_memory``: bytes beside the model, for a build; None means most of what is free."""
        self.own = artifact
        self._loaded, self._max_memory = loaded, max_memory
        self._built = {artifact.header.layer: artifact}

    def at(self, layer: int) -> OperatorArtifact:
        """The operator at a layer. Raises :class:`BuildError` where there is no such layer, or too little memory."""
        if layer not in self._built:
            self._built[layer] = operator_at_layer(self.own, layer, self._loaded, max_memory=self._max_memory)
        return self._built[layer]

    def placed(self, layer: int) -> PlacedOperator:
        """The operator at a layer, on the model's device."""
        return placed(self.at(layer), self._loaded)

    def anchors(self, layer: int) -> PlacedOperator:
        """The anchors at a layer, without a build."""
        return anchors_at(self.own, layer, self._loaded)


def layers_to_try(artifact: OperatorArtifact, loaded: LoadedModel, spec: CalibrationSpec) -> tuple[int, ...]:
    """Those given; else the operator's own, and the most accessible below and above it."""
    header = artifact.header
    found = candidate_layers(artifact, spec.layers)
    for layer in found:
        resolve_layer(layer, header.profile, loaded)
    if spec.layers is not None or len(found) <= spec.max_layers:
        return found
    scores = {layer: accessibility(_anchor(artifact, layer, loaded), spec.words, loaded, header.profile)
              for layer in found}  # fmt: skip
    return prune_layers(header.layer, scores, spec.max_layers)


def prune_layers(own: int, scores: Mapping[int, float], count: int) -> tuple[int, ...]:
    """The operator's own layer and the most accessible others, at most ``count``, from both sides in turn.

    The deeper side first. Where embeddings are tied, early layers say the words of their input: by the score alone they
    would always win, and the layers at which a push changes what is written would not be looked at.
    """
    ranked = sorted(scores, key=lambda layer: scores[layer], reverse=True)
    deeper, earlier = ([layer for layer in ranked if sign * (layer - own) > 0] for sign in (1, -1))
    in_turn = [layer for pair in zip_longest(deeper, earlier) for layer in pair if layer is not None]
    return tuple(sorted([own, *in_turn[: count - 1]]))


def candidate_layers(artifact: OperatorArtifact, requested: Sequence[int] | None) -> tuple[int, ...]:
    """The layers to look at, in order: those requested; where None, the operator's own and six over the model's middle.

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


def anchors_at(artifact: OperatorArtifact, layer: int, loaded: LoadedModel) -> PlacedOperator:
    """The anchors that an operator of the same texts has at a layer, without its map: two forward passes, no build."""
    header = artifact.header
    if layer == header.layer:
        return placed(artifact, loaded)
    contrast = _anchor(artifact, layer, loaded)
    y = _mean_target(artifact, layer, loaded)
    d = loaded.hidden_size
    operator = PreparedOperator(
        factors=torch.empty(0, 0, d, device=loaded.device),
        basis=None,
        offset=None,
        base=torch.empty(0, device=loaded.device),
        unit_anchor=(y / torch.linalg.vector_norm(y)).float(),
        unit_contrast=(contrast / torch.linalg.vector_norm(contrast)).float(),
    )
    return PlacedOperator(operator, injection_layer(header.profile, layer))


def operator_at_layer(
    artifact: OperatorArtifact, layer: int, loaded: LoadedModel, *, max_memory: int | None = None
) -> OperatorArtifact:
    """Builds the concept of an operator at another layer: same texts, profile, rank, weighting, seed, neutral texts.

    Raises :class:`BuildError` where the layer does not exist, or there is too little memory.
    """
    header, low = artifact.header, artifact.header.low_rank
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
    return build_operator(spec, loaded, max_memory=max_memory)


def _mean_target(artifact: OperatorArtifact, layer: int, loaded: LoadedModel) -> torch.Tensor:
    """y (d,) float64 of the operator's texts at a layer."""
    header = artifact.header
    targets = [last_target(text.ids, loaded, layer=layer, profile=header.profile) for text in header.texts]
    return torch.stack([share * each for share, each in zip(header.shares, targets, strict=True)]).sum(0)


def _anchor(artifact: OperatorArtifact, layer: int, loaded: LoadedModel) -> torch.Tensor:
    """y - m (d,) float64 at a layer."""
    header = artifact.header
    neutral = tokenise_neutral(loaded) if header.neutral is None else header.neutral
    mean = neutral_mean(neutral, loaded, layer=layer, profile=header.profile)
    return _mean_target(artifact, layer, loaded) - sum(header.shares) * mean


def placed(artifact: OperatorArtifact, loaded: LoadedModel) -> PlacedOperator:
    return PlacedOperator(prepare(artifact, loaded.device), artifact.header.injection_layer)
