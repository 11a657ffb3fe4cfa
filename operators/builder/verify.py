"""An operator held against the model it says it came from."""

from __future__ import annotations

import torch

from operators.builder.checks import (
    RECONSTRUCTION_TOLERANCE,
    check_basis,
    check_map,
    check_reconstruction,
    dtype_name,
    reconstruction_error,
)
from operators.builder.concept import Concept
from operators.core.artifact import OperatorArtifact
from operators.core.errors import IncompatibleOperatorError, ReconstructionError
from operators.core.header import DTypeName, OperatorHeader
from operators.maps.detach import RULE_SET
from operators.maps.jacobian import relative_error
from operators.maps.replay import Replay
from operators.maps.weighted_map import MeanMap
from operators.model.loading import LoadedModel

_PROBES = 8


def verify_operator(artifact: OperatorArtifact, loaded: LoadedModel) -> float:
    """Holds an artifact against the model it says it came from: |sum J x + c - y| / |y|, with y computed anew.

    The model is best loaded in the artifact's dtype; in a coarser one, its own rounding is what is measured.

    Raises:
        IncompatibleOperatorError: another model, tokenizer, depth or width; names what was found and what was
            expected.
        ReconstructionError: the operator, its anchor or its substitute base is not what this model gives.
    """
    check_compatible(artifact.header, loaded)
    header = artifact.header
    replays = [Replay(loaded.model, text.ids, layer=header.layer, profile=header.profile) for text in header.texts]
    for text, replay in zip(header.texts, replays, strict=True):
        check_map(Concept(text.text, text.ids), replay, loaded, layer=header.layer, profile=header.profile)
    concept = MeanMap(replays, header.shares)
    dtype = max(header.model_dtype, dtype_name(loaded.dtype), key=RECONSTRUCTION_TOLERANCE.__getitem__)
    y = concept.y.double()
    if artifact.basis is not None:
        check_basis(artifact.basis.to(concept.y), concept.y - concept.offset, dtype)
    factors = artifact.factors.to(concept.y)
    basis = None if artifact.basis is None else artifact.basis.to(concept.y)
    error = max(reconstruction_error(replay, factors, basis, replays) for replay in replays)
    check_reconstruction(error, header.layer, dtype)
    last = concept.last_term if basis is None else basis @ (basis.T @ concept.last_term)
    for name, stored, expected in (
        ("anchor", artifact.anchor, concept.y),
        ("substitute_base", artifact.substitute_base, concept.y - last),
        ("offset", artifact.offset, concept.offset),
    ):
        # Against |y|, not against itself: the base of a one-token concept is zero up to rounding.
        value = y.new_zeros(len(y)) if stored is None else stored.to(y)
        off = torch.linalg.vector_norm(value - expected.double()) / torch.linalg.vector_norm(y)
        _check_tensor(name, float(off), dtype)
    _check_tensor("factors", _probe(concept, factors, basis), dtype)
    return error


def _probe(concept: MeanMap, factors: torch.Tensor, basis: torch.Tensor | None) -> float:
    """How far U sum B_i v_i is from U U^T sum J_i v_i for random v, relative: what one text's own x cannot show."""
    n, d = concept.shape
    generator = torch.Generator(concept.y.device).manual_seed(0)
    probes = torch.randn(_PROBES, n, d, generator=generator, dtype=concept.y.dtype, device=concept.y.device)
    expected = concept.push(probes)
    stored = torch.einsum("nrj,lnj->lr", factors, probes)
    return relative_error(stored, expected if basis is None else expected @ basis)


def _check_tensor(name: str, off: float, dtype: DTypeName) -> None:
    if not off <= RECONSTRUCTION_TOLERANCE[dtype]:
        raise ReconstructionError(f"tensor {name!r} is off by {off:.1e} of what this model gives")


def check_compatible(header: OperatorHeader, loaded: LoadedModel) -> None:
    """Raises :class:`IncompatibleOperatorError` naming the first thing in which the model is not the header's."""
    for what, expected, found in (
        ("number of layers", header.num_layers, loaded.num_layers),
        ("hidden size", header.hidden_size, loaded.hidden_size),
        ("model fingerprint", header.model_fingerprint, loaded.fingerprint),
        ("tokenizer fingerprint", header.tokenizer_fingerprint, loaded.tokenizer_fingerprint),
        ("rule set", header.rule_set, RULE_SET),
    ):
        if found != expected:
            raise IncompatibleOperatorError(
                f"{what} of {loaded.name!r} is {found}; the operator was built on {header.model!r} with {expected}"
            )
    size = int(loaded.model.get_input_embeddings().weight.shape[0])
    largest = max(max(text.ids) for text in header.texts)
    if largest >= size:
        raise IncompatibleOperatorError(f"the concept has token {largest}; {loaded.name!r} has tokens 0 to {size - 1}")
