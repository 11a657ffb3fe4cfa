"""What an operator is held to, when it is built and whenever it is verified."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch

from operators.builder.concept import Concept
from operators.core.errors import BuildError, ReconstructionError
from operators.core.header import DTypeName, Profile
from operators.maps.jacobian import relative_error
from operators.maps.replay import Replay, hidden_state
from operators.model.loading import LoadedModel, embed

# Bounds on |sum J x - y| / |y|: an order of magnitude above what sound builds measure, far below what a wrong
# rule gives.
RECONSTRUCTION_TOLERANCE = MappingProxyType({"float64": 1e-11, "float32": 5e-5, "bfloat16": 5e-2})
# Bounds on the change of the forward pass. transformers' own norms compute in float32 even in a float64
# model.
_FORWARD_TOLERANCE = MappingProxyType({"float64": 1e-5, "float32": 1e-5, "bfloat16": 5e-2})


def check_map(text: Concept, replay: Replay, loaded: LoadedModel, *, layer: int, profile: Profile) -> None:
    """Raises :class:`ReconstructionError` where the replay of a text is not what the model does with it."""
    if not bool(torch.isfinite(replay.y).all()):
        raise ReconstructionError(
            f"the hidden state of {text.text!r} at layer {layer} of {loaded.name} is not finite in "
            f"{dtype_name(loaded.dtype)}"
        )
    _check_forward(text.ids, replay.y, loaded, layer=layer, profile=profile)
    check_reconstruction(
        relative_error(replay.push(replay.x[None])[0] + replay.offset, replay.y), layer, dtype_name(loaded.dtype)
    )


def check_basis(basis: torch.Tensor, point: torch.Tensor, dtype: DTypeName) -> None:
    """Raises :class:`ReconstructionError` unless U (d, r) is orthonormal and holds ``point`` = y - c (d,)."""
    skew = float((basis.T @ basis - torch.eye(basis.shape[1]).to(basis)).abs().max())
    missed = relative_error(basis @ (basis.T @ point), point)
    for what, off in (("is not orthonormal", skew), ("misses y - c", missed)):
        if not off <= RECONSTRUCTION_TOLERANCE[dtype]:
            raise ReconstructionError(f"tensor 'basis' {what}: it is off by {off:.1e}")


def reconstruction_error(
    replay: Replay, factors: torch.Tensor, basis: torch.Tensor | None, replays: Sequence[Replay]
) -> float:
    """|sum J_i x_i + c - y| / |y| of one text: by the operator itself where it is that text's, else by the replay."""
    if len(replays) > 1:
        return relative_error(replay.push(replay.x[None])[0] + replay.offset, replay.y)
    value = torch.einsum("nrj,nj->r", factors, replay.x)
    return relative_error((value if basis is None else basis @ value) + replay.offset, replay.y)


def _check_forward(ids: tuple[int, ...], y: torch.Tensor, loaded: LoadedModel, *, layer: int, profile: Profile) -> None:
    embeddings = embed(loaded.model, torch.tensor(ids, device=loaded.device))
    with torch.no_grad():
        plain = hidden_state(loaded.model, embeddings[None], layer=layer, profile=profile)[0]
    moved, dtype = relative_error(y, plain), dtype_name(loaded.dtype)
    if not moved <= _FORWARD_TOLERANCE[dtype]:
        raise ReconstructionError(
            f"the detached forward pass differs from the plain one by {moved:.1e} at layer {layer}; at most "
            f"{_FORWARD_TOLERANCE[dtype]:.0e} is accepted in {dtype}"
        )


def check_reconstruction(error: float, layer: int, dtype: DTypeName) -> None:
    if not error <= RECONSTRUCTION_TOLERANCE[dtype]:
        raise ReconstructionError(
            f"sum J x misses the hidden state by {error:.1e} at layer {layer}; at most "
            f"{RECONSTRUCTION_TOLERANCE[dtype]:.0e} is accepted in {dtype}"
        )


def dtype_name(dtype: torch.dtype) -> DTypeName:
    """The dtype as headers and options say it. Raises :class:`BuildError` for one that no artifact has."""
    names: dict[torch.dtype, DTypeName] = {
        torch.float32: "float32",
        torch.float64: "float64",
        torch.bfloat16: "bfloat16",
    }
    name = names.get(dtype)
    if name is None:
        raise BuildError(f"model dtype {dtype}; {', '.join(names.values())} are accepted")
    return name
