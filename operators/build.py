"""Concept and model in, verified operator out."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType

import torch

from operators import __version__
from operators.artifact import (
    MAX_BYTES,
    DTypeName,
    OperatorArtifact,
    OperatorHeader,
    Profile,
    Recommended,
    injection_layer,
    make_artifact,
)
from operators.concept import Concept
from operators.detach import RULE_SET, detached
from operators.errors import BuildError, IncompatibleOperatorError, ReconstructionError
from operators.linear_map import Progress, detached_jacobian, relative_error
from operators.models import LoadedModel, block_input, embed
from operators.replay import hidden_state

# Bounds on |sum J x - y| / |y|: an order of magnitude above what sound builds measure, far below what a wrong
# rule gives.
_RECONSTRUCTION_TOLERANCE = MappingProxyType({"float64": 1e-11, "float32": 5e-5, "bfloat16": 5e-2})
# Bounds on the change of the forward pass. transformers' own norms compute in float32 even in a float64
# model.
_FORWARD_TOLERANCE = MappingProxyType({"float64": 1e-5, "float32": 1e-5, "bfloat16": 5e-2})


@dataclass(frozen=True)
class BuildSpec:
    """What to build. ``layer`` None takes the profile's default, floor(2L/3)."""

    concept: Concept
    profile: Profile = "residual"
    layer: int | None = None
    recommended: Recommended = field(default_factory=Recommended)


def build_operator(spec: BuildSpec, loaded: LoadedModel, *, progress: Progress | None = None) -> OperatorArtifact:
    """Computes the exact operator and checks it against the model before anybody can use it.

    Raises:
        BuildError: the layer is out of range, or the artifact would be larger than any reader takes.
        UnsupportedModelError: the architecture has no detach table.
        ReconstructionError: the detached forward or the reconstruction is off.
    """
    layer = check_layer(spec.layer, spec.profile, loaded)
    dtype = _dtype_name(loaded)
    _check_size(spec.concept, loaded)
    found = detached_jacobian(loaded.model, spec.concept.ids, layer=layer, profile=spec.profile, progress=progress)
    if not bool(torch.isfinite(found.jacobian).all()):
        raise ReconstructionError(f"the Jacobian of {spec.concept.text!r} at layer {layer} is not finite in {dtype}")
    _check_forward(spec.concept.ids, found.y, loaded, layer=layer, profile=spec.profile)
    _check_reconstruction(found.reconstruction_error, layer, dtype)
    anchor = found.reconstruction
    header = OperatorHeader(
        concept=spec.concept.text,
        concept_ids=spec.concept.ids,
        model=loaded.name,
        architecture=type(loaded.model).__name__,
        model_fingerprint=loaded.fingerprint,
        tokenizer_fingerprint=loaded.tokenizer_fingerprint,
        profile=spec.profile,
        rule_set=RULE_SET,
        layer=layer,
        injection_layer=injection_layer(spec.profile, layer),
        num_layers=loaded.num_layers,
        hidden_size=loaded.hidden_size,
        dtype=dtype,
        recommended=spec.recommended,
        reconstruction_error=found.reconstruction_error,
        builder_version=__version__,
        created=datetime.now(UTC).replace(microsecond=0),
    )
    base = anchor - found.jacobian[-1] @ found.x[-1]
    offset = found.offset if bool(found.offset.any()) else None
    return make_artifact(header, found.jacobian, anchor, base, offset)


def check_layer(layer: int | None, profile: Profile, loaded: LoadedModel) -> int:
    """The layer to build at. Raises :class:`BuildError` when there is no such layer for this profile."""
    if layer is None:
        return max(1, 2 * loaded.num_layers // 3)
    # The residual operator is added to the input of block `layer`, so that block must exist.
    last = loaded.num_layers if profile == "golden" else loaded.num_layers - 1
    if not 1 <= layer <= last:
        raise BuildError(f"layer {layer} of {loaded.name} for profile {profile!r}; 1 to {last} are accepted")
    return layer


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
    embeddings = embed(loaded.model, torch.tensor(header.concept_ids, device=loaded.device))
    with detached(loaded.model), torch.no_grad():
        y = hidden_state(loaded.model, embeddings[None], layer=header.layer, profile=header.profile)[0]
    _check_forward(header.concept_ids, y, loaded, layer=header.layer, profile=header.profile)
    x = block_input(loaded.model, embeddings)
    # In float64, one block at a time: all of them at once may not fit.
    terms = torch.stack(
        [
            block.to(y.device, torch.float64) @ vector
            for block, vector in zip(artifact.jacobian, x.double(), strict=True)
        ]
    )
    value = terms.sum(0)
    if artifact.offset is not None:
        value = value + artifact.offset.to(value)
    error = relative_error(value, y)
    dtype = max(header.dtype, _dtype_name(loaded), key=_RECONSTRUCTION_TOLERANCE.__getitem__)
    _check_reconstruction(error, header.layer, dtype)
    for name, stored, expected in (
        ("anchor", artifact.anchor, value),
        ("substitute_base", artifact.substitute_base, value - terms[-1]),
    ):
        # Against |y|, not against itself: the base of a one-token concept is zero up to rounding.
        off = float(torch.linalg.vector_norm(stored.to(expected) - expected) / torch.linalg.vector_norm(y.double()))
        if not off <= _RECONSTRUCTION_TOLERANCE[dtype]:
            raise ReconstructionError(f"tensor {name!r} is off by {off:.1e} of the hidden state that J gives")
    return error


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
    if max(header.concept_ids) >= size:
        raise IncompatibleOperatorError(
            f"the concept has token {max(header.concept_ids)}; {loaded.name!r} has tokens 0 to {size - 1}"
        )


def _check_size(concept: Concept, loaded: LoadedModel) -> None:
    n, d = len(concept.ids), loaded.hidden_size
    size = n * d * d * loaded.dtype.itemsize
    if size > MAX_BYTES:
        raise BuildError(
            f"the operator of {n} tokens at hidden size {d} in {loaded.dtype} takes {size} bytes; at most "
            f"{MAX_BYTES} are accepted"
        )


def _check_forward(ids: tuple[int, ...], y: torch.Tensor, loaded: LoadedModel, *, layer: int, profile: Profile) -> None:
    embeddings = embed(loaded.model, torch.tensor(ids, device=loaded.device))
    with torch.no_grad():
        plain = hidden_state(loaded.model, embeddings[None], layer=layer, profile=profile)[0]
    moved, dtype = relative_error(y, plain), _dtype_name(loaded)
    if not moved <= _FORWARD_TOLERANCE[dtype]:
        raise ReconstructionError(
            f"the detached forward pass differs from the plain one by {moved:.1e} at layer {layer}; at most "
            f"{_FORWARD_TOLERANCE[dtype]:.0e} is accepted in {dtype}"
        )


def _check_reconstruction(error: float, layer: int, dtype: DTypeName) -> None:
    if not error <= _RECONSTRUCTION_TOLERANCE[dtype]:
        raise ReconstructionError(
            f"sum J x misses the hidden state by {error:.1e} at layer {layer}; at most "
            f"{_RECONSTRUCTION_TOLERANCE[dtype]:.0e} is accepted in {dtype}"
        )


def _dtype_name(loaded: LoadedModel) -> DTypeName:
    names: dict[torch.dtype, DTypeName] = {
        torch.float32: "float32",
        torch.float64: "float64",
        torch.bfloat16: "bfloat16",
    }
    name = names.get(loaded.dtype)
    if name is None:
        raise BuildError(f"model dtype {loaded.dtype}; {', '.join(names.values())} are accepted")
    return name
