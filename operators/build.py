"""Concept and model in, verified operator out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType

import torch

from operators import __version__
from operators.artifact import (
    DTypeName,
    OperatorArtifact,
    OperatorHeader,
    Profile,
    Recommended,
    injection_layer,
    make_artifact,
)
from operators.concept import Concept
from operators.detach import RULE_SET
from operators.errors import BuildError, ReconstructionError
from operators.linear_map import LinearMap, Progress, detached_jacobian, hidden_state, relative_error
from operators.models import LoadedModel, embed

# Bounds on |sum J x - y| / |y|: an order of magnitude above what sound builds measure, far below what a wrong rule gives.
_RECONSTRUCTION_TOLERANCE = MappingProxyType({"float64": 1e-11, "float32": 5e-5, "bfloat16": 5e-2})
# Bounds on the change of the forward pass. transformers' own norms compute in float32 even in a float64 model.
_FORWARD_TOLERANCE = MappingProxyType({"float64": 1e-5, "float32": 1e-5, "bfloat16": 5e-2})


@dataclass(frozen=True)
class BuildSpec:
    """What to build. ``layer`` None takes the profile's default, floor(2L/3)."""

    concept: Concept
    profile: Profile = "residual"
    layer: int | None = None
    recommended: Recommended = Recommended()


def build_operator(
    spec: BuildSpec, loaded: LoadedModel, *, progress: Progress | None = None
) -> OperatorArtifact:
    """Computes the exact operator and checks it against the model before anybody can use it.

    Raises:
        BuildError: the layer is out of range.
        UnsupportedModelError: the architecture has no detach table.
        ReconstructionError: the detached forward or the reconstruction is off.
    """
    layer = check_layer(spec.layer, spec.profile, loaded)
    dtype = _dtype_name(loaded)
    found = detached_jacobian(
        loaded.model, spec.concept.ids, layer=layer, profile=spec.profile, progress=progress
    )
    _check(found, spec, layer, dtype, loaded)
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
    return make_artifact(header, found.jacobian, anchor, base)


def check_layer(layer: int | None, profile: Profile, loaded: LoadedModel) -> int:
    """The layer to build at. Raises :class:`BuildError` when there is no such layer for this profile."""
    if layer is None:
        return max(1, 2 * loaded.num_layers // 3)
    # The residual operator is added to the input of block `layer`, so that block must exist.
    last = loaded.num_layers if profile == "golden" else loaded.num_layers - 1
    if not 1 <= layer <= last:
        raise BuildError(f"layer {layer} of {loaded.name} for profile {profile!r}; 1 to {last} are accepted")
    return layer


def _check(found: LinearMap, spec: BuildSpec, layer: int, dtype: DTypeName, loaded: LoadedModel) -> None:
    if not bool(torch.isfinite(found.jacobian).all()):
        raise ReconstructionError(f"the Jacobian of {spec.concept.text!r} at layer {layer} is not finite in {dtype}")
    x = embed(loaded.model, torch.tensor([spec.concept.ids], device=loaded.device))
    with torch.no_grad():
        plain = hidden_state(loaded.model, x, layer=layer, profile=spec.profile)[0]
    moved = relative_error(found.y, plain)
    if not moved <= _FORWARD_TOLERANCE[dtype]:
        raise ReconstructionError(
            f"the detached forward pass differs from the plain one by {moved:.1e} at layer {layer}; at most "
            f"{_FORWARD_TOLERANCE[dtype]:.0e} is accepted in {dtype}"
        )
    error = found.reconstruction_error
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
