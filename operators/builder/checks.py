"""The bounds that an operator must keep, when it is built and whenever it is verified."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Protocol

import torch

from operators.builder.concept import Concept
from operators.core.dtypes import DTYPES
from operators.core.errors import BuildError, ReconstructionError
from operators.core.header import DTypeName, Profile
from operators.maps.detach import detached
from operators.maps.jacobian import relative_error
from operators.maps.replay import Replay, input_and_target, target_hidden_state
from operators.model.loading import LoadedModel, embed

RECONSTRUCTION_TOLERANCE = MappingProxyType({"float64": 1e-11, "float32": 5e-5, "bfloat16": 5e-2})
"""Bounds of |sum_i J_i x_i + c - y| / |y|, by the model's dtype: an order of magnitude above what sound builds measure,
far below what a wrong rule gives."""
_FORWARD_TOLERANCE = MappingProxyType({"float64": 1e-5, "float32": 1e-5, "bfloat16": 5e-2})
"""Bounds of the relative change of the forward pass. transformers' own norms compute in float32 even in a float64
model."""


_GRADIENT_TOLERANCE = MappingProxyType({"float64": 1e-5, "float32": 1e-3, "bfloat16": 0.2})
"""Bounds of their relative difference. A bfloat16 model's gradients are rounded at every step, its replay's are not."""
_GRADIENT_TOKENS = 8


class MappedText(Protocol):
    """What is known of a text's map: a replay, or what a pass over streamed blocks recorded."""

    x: torch.Tensor
    y: torch.Tensor
    offset: torch.Tensor

    def reconstruction(self) -> torch.Tensor:
        """sum_i J_i x_i + c, shape (d,)."""
        ...


def check_replay(text: Concept, replay: Replay, loaded: LoadedModel, *, layer: int, profile: Profile) -> None:
    """Holds the replay of a text to the model: same target as the plain forward pass, and given back by the map.

    Raises:
        ReconstructionError: the target is not finite, or one of the two is off.
    """
    embeddings = embed(loaded.model, torch.tensor(text.ids, device=loaded.device))
    with torch.no_grad():
        plain = target_hidden_state(loaded.model, embeddings[None], layer=layer, profile=profile)[0]
    check_mapped(text, replay, plain, loaded, layer=layer)


def check_mapped(text: Concept, mapped: MappedText, plain: torch.Tensor, loaded: LoadedModel, *, layer: int) -> None:
    """The same, with the target ``plain`` (d,) of the plain forward pass. Raises :class:`ReconstructionError`."""
    dtype = dtype_name(loaded.dtype)
    if not bool(torch.isfinite(mapped.y).all()):
        raise ReconstructionError(
            f"the hidden state of {text.text!r} at layer {layer} of {loaded.name} is not finite in {dtype}"
        )
    error = relative_error(mapped.y, plain)
    if not error <= _FORWARD_TOLERANCE[dtype]:
        raise ReconstructionError(
            f"the detached forward pass differs from the plain one by {error:.1e} at layer {layer}; at most "
            f"{_FORWARD_TOLERANCE[dtype]:.0e} is accepted in {dtype}"
        )
    check_reconstruction(relative_error(mapped.reconstruction(), mapped.y), layer, dtype)


def check_gradients(text: Concept, replay: Replay, loaded: LoadedModel, *, layer: int, profile: Profile) -> None:
    """Holds the replay to the gradients of the detached model, for the first tokens of a text and a random cotangent.

    Two ways to the same J: what one of them leaves live that the other froze shows here, and in no reconstruction.

    Raises:
        ReconstructionError: they differ.
    """
    ids = text.ids[:_GRADIENT_TOKENS]
    if len(ids) < len(text.ids):
        replay = Replay(loaded.model, ids, layer=layer, profile=profile)
    embeddings = embed(loaded.model, torch.tensor(ids, device=loaded.device)).clone().requires_grad_(True)
    with detached(loaded.model), torch.enable_grad():
        x, y = input_and_target(loaded.model, embeddings[None], layer=layer, profile=profile)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    (gradient,) = torch.autograd.grad(y, x, cotangent)
    error = relative_error(gradient, replay.vjp(cotangent.to(replay.y)))
    check_gradient_error(error, layer, dtype_name(loaded.dtype))


def check_gradient_error(error: float, layer: int, dtype: DTypeName) -> None:
    """Raises :class:`ReconstructionError` unless ``error`` is within the bound of ``dtype``; NaN is not."""
    if not error <= _GRADIENT_TOLERANCE[dtype]:
        raise ReconstructionError(
            f"the gradients of the detached model differ from its replay's by {error:.1e} at layer {layer}; at most "
            f"{_GRADIENT_TOLERANCE[dtype]:.0e} is accepted in {dtype}: something is live that the table freezes"
        )


def check_basis(basis: torch.Tensor, point: torch.Tensor, dtype: DTypeName) -> None:
    """Raises :class:`ReconstructionError` unless U (d, r) is orthonormal and its span holds ``point`` = y - c (d,)."""
    skew = float((basis.T @ basis - torch.eye(basis.shape[1]).to(basis)).abs().max())
    missed = relative_error(basis @ (basis.T @ point), point)
    for problem, error in (("is not orthonormal", skew), ("misses y - c", missed)):
        # Negated, so that NaN is refused too.
        if not error <= RECONSTRUCTION_TOLERANCE[dtype]:
            raise ReconstructionError(f"tensor 'basis' {problem}: it is off by {error:.1e}")


def worst_reconstruction_error(
    replays: Sequence[MappedText], factors: torch.Tensor, basis: torch.Tensor | None
) -> float:
    """|sum_i J_i x_i + c - y| / |y| of the text where it is largest, for J_i = U B_i.

    Args:
        factors: B (n, r, d), or J (n, d, d) of an exact operator.
        basis: U (d, r); None for an exact operator.

    Of several texts the operator is a weighted sum, which gives none of them back: then each text's own replay is what
    is measured.
    """
    if len(replays) > 1:
        return max(relative_error(replay.reconstruction(), replay.y) for replay in replays)
    (replay,) = replays
    value = torch.einsum("nrj,nj->r", factors, replay.x)
    return relative_error((value if basis is None else basis @ value) + replay.offset, replay.y)


def check_reconstruction(error: float, layer: int, dtype: DTypeName) -> None:
    """Raises :class:`ReconstructionError` unless ``error`` is within the bound of ``dtype``; NaN is not."""
    if not error <= RECONSTRUCTION_TOLERANCE[dtype]:
        raise ReconstructionError(
            f"sum J x misses the hidden state by {error:.1e} at layer {layer}; at most "
            f"{RECONSTRUCTION_TOLERANCE[dtype]:.0e} is accepted in {dtype}"
        )


def dtype_name(dtype: torch.dtype) -> DTypeName:
    """The dtype as headers and options spell it. Raises :class:`BuildError` for one that no artifact has."""
    name = next((name for name, accepted in DTYPES.items() if accepted == dtype), None)
    if name is None:
        raise BuildError(f"model dtype {dtype}; {', '.join(DTYPES)} are accepted")
    return name
