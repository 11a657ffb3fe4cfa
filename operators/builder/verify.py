"""Checks a stored operator against the model that it was built on."""

from __future__ import annotations

import torch

from operators.builder.checks import (
    RECONSTRUCTION_TOLERANCE,
    check_basis,
    check_reconstruction,
    check_replay,
    dtype_name,
    worst_reconstruction_error,
)
from operators.builder.concept import Concept
from operators.builder.neutral import compute_neutral_mean
from operators.core.artifact import OperatorArtifact
from operators.core.errors import BuildError, IncompatibleOperatorError, ReconstructionError
from operators.core.header import DTypeName, OperatorHeader
from operators.maps.detach import RULE_SET
from operators.maps.jacobian import relative_error
from operators.maps.replay import Replay
from operators.maps.weighted_map import WeightedMap
from operators.model.identity import check_fingerprints
from operators.model.loading import LoadedModel

_PROBES = 8
"""Random tangents that the factors are compared at."""


def verify_operator(artifact: OperatorArtifact, loaded: LoadedModel) -> float:
    """Computes every tensor of the artifact anew, or its products, and compares.

    The model is best loaded in the artifact's dtype; in a coarser one, its own rounding is what is measured.

    Returns:
        |sum_i J_i x_i + c - y| / |y| of the text where it is largest, with y computed anew.

    Raises:
        BuildError: it is a vector, which is not computed from a text.
        IncompatibleOperatorError: another model, tokenizer, depth or width; names what was found and what was
            expected.
        ReconstructionError: the operator, its anchor, its neutral mean or its substitute base is not what this model
            gives.
    """
    check_compatible(artifact.header, loaded)
    header = artifact.header
    if header.lens is not None:
        raise BuildError("a lens is compared with its neutral texts, and has no text of its own")
    if header.vector is not None:
        raise BuildError("a vector has no map of a model that could be computed anew; its model can be checked")
    replays = [Replay(loaded.model, text.ids, layer=header.layer, profile=header.profile) for text in header.texts]
    for text, replay in zip(header.texts, replays, strict=True):
        check_replay(Concept(text.text, text.ids), replay, loaded, layer=header.layer, profile=header.profile)
    weighted_map = WeightedMap(replays, header.shares)
    # The coarser of the two dtypes decides how much rounding is accepted.
    dtype = max(header.model_dtype, dtype_name(loaded.dtype), key=RECONSTRUCTION_TOLERANCE.__getitem__)
    if artifact.basis is not None:
        check_basis(artifact.basis.to(weighted_map.y), weighted_map.y - weighted_map.offset, dtype)
    factors = artifact.factors.to(weighted_map.y)
    basis = None if artifact.basis is None else artifact.basis.to(weighted_map.y)
    error = worst_reconstruction_error(replays, factors, basis)
    check_reconstruction(error, header.layer, dtype)
    y = weighted_map.y.double()
    for name, stored, expected in (
        ("anchor", artifact.anchor, weighted_map.y),
        ("substitute_base", artifact.substitute_base, weighted_map.substitute_base(basis)),
        ("offset", artifact.offset, weighted_map.offset),
        *_neutral(artifact, loaded),
    ):
        # Relative to |y|, not to the tensor itself: the base of a one-token concept is zero up to rounding.
        value = y.new_zeros(len(y)) if stored is None else stored.to(y)
        difference = torch.linalg.vector_norm(value - expected.double()) / torch.linalg.vector_norm(y)
        _check_tensor(name, float(difference), dtype)
    _check_tensor("factors", _factors_error(weighted_map, factors, basis), dtype)
    return error


def _neutral(artifact: OperatorArtifact, loaded: LoadedModel) -> list[tuple[str, torch.Tensor | None, torch.Tensor]]:
    """The neutral mean and what it is computed anew, of an artifact that has one."""
    header = artifact.header
    if header.neutral is None:
        return []
    mean = compute_neutral_mean(header.neutral, loaded, layer=header.layer, profile=header.profile)
    return [("neutral", artifact.neutral, sum(header.shares) * mean)]


def _factors_error(weighted_map: WeightedMap, factors: torch.Tensor, basis: torch.Tensor | None) -> float:
    """Relative error of sum_i B_i v_i against U^T sum_i J_i v_i for random tangents v.

    The reconstruction tests the factors at the text's own x only, and the factors of several texts not at all.
    """
    n, d = weighted_map.shape
    generator = torch.Generator(weighted_map.y.device).manual_seed(0)
    tangents = torch.randn(_PROBES, n, d, generator=generator, dtype=weighted_map.y.dtype, device=weighted_map.y.device)
    expected = weighted_map.jvp(tangents)
    stored = torch.einsum("nrj,lnj->lr", factors, tangents)
    return relative_error(stored, expected if basis is None else expected @ basis)


def _check_tensor(name: str, error: float, dtype: DTypeName) -> None:
    if not error <= RECONSTRUCTION_TOLERANCE[dtype]:
        raise ReconstructionError(f"tensor {name!r} is off by {error:.1e} of what this model gives")


def check_compatible(header: OperatorHeader, loaded: LoadedModel) -> None:
    """Raises :class:`IncompatibleOperatorError` naming the first property in which the model is not the header's."""
    for name, expected, found in (
        ("number of layers", header.num_layers, loaded.num_layers),
        ("hidden size", header.hidden_size, loaded.hidden_size),
        ("rule set", header.rule_set, RULE_SET if header.vector is None else ""),
    ):
        if found != expected:
            raise IncompatibleOperatorError(
                f"{name} of {loaded.name!r} is {found}; the operator was built on {header.model!r} with {expected}"
            )
    check_fingerprints(header, loaded)
    size = int(loaded.model.get_input_embeddings().weight.shape[0])
    largest = max((max(text.ids) for text in header.texts), default=0)
    if largest >= size:
        raise IncompatibleOperatorError(f"the concept has token {largest}; {loaded.name!r} has tokens 0 to {size - 1}")
