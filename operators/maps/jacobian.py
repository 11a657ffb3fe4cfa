"""The Jacobian of a prompt, dense: one (d, d) matrix per position.

With everything but the linear path frozen, the stream entering block s is, at the last position,

    h^(s)_{n-1} = sum_i J_i x_i + c,        J_i = dh^(s)_{n-1} / dx_i   (detached)

(Golden, section 3), with c = 0 for a model without biases. The equality is exact up to rounding: about 1e-6 in float32
and 1e-15 in float64. It does not hold for the ordinary Jacobian, of the model as it is: that one describes small
changes of x, and sum_i J_i x_i is not even close to h.

Cost: d VJPs, hence ceil(d / VECTORS_PER_PASS) backward passes whatever n is (more for a long prompt, see ``replay``),
and n d^2 numbers of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from operators.core.header import Profile
from operators.maps.replay import VECTORS_PER_PASS, AffineMap, Replay, input_and_target
from operators.model.loading import block_input, embed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class DenseMap:
    """The affine map of one prompt with its matrices. Filled by the functions of this module.

    ``jacobian`` (n, d, d), with ``jacobian[i] = dh/dx_i`` (output, input); ``x`` (n, d), the prompt's block input;
    ``y`` (d,) = h at the last position; ``offset`` (d,) = c.
    """

    jacobian: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    offset: torch.Tensor

    @property
    def reconstruction(self) -> torch.Tensor:
        """sum_i J_i x_i + c, shape (d,)."""
        return torch.einsum("nij,nj->i", self.jacobian, self.x) + self.offset

    @property
    def reconstruction_error(self) -> float:
        """|sum_i J_i x_i + c - y| / |y|."""
        return relative_error(self.reconstruction, self.y)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference| of two tensors of one shape, in Frobenius norms and float64."""
    reference = reference.double()
    return float(torch.linalg.vector_norm(value.double() - reference) / torch.linalg.vector_norm(reference))


def exact_jacobian(affine_map: AffineMap, *, rows_per_pass: int = VECTORS_PER_PASS) -> torch.Tensor:
    """J (n, d, d) of any affine map, ``rows_per_pass`` rows of every J_i at a time: ceil(d / rows_per_pass) VJPs."""
    n, d = affine_map.shape
    return _stack_rows(affine_map.vjp, n, d, min(rows_per_pass, d), affine_map.y)


def dense_map(replay: Replay, *, rows_per_pass: int = VECTORS_PER_PASS) -> DenseMap:
    """The map of one prompt, written out, ``rows_per_pass`` rows of every J_i at a time."""
    return DenseMap(exact_jacobian(replay, rows_per_pass=rows_per_pass), replay.x, replay.y, replay.offset)


def detached_jacobian(model: PreTrainedModel, ids: tuple[int, ...], *, layer: int, profile: Profile) -> DenseMap:
    """The detached Jacobian of the prompt ``ids`` (n tokens) at layer ``layer``, from 1 to L.

    Returns:
        J (n, d, d) and c (d,) with sum_i J_i x_i + c = y (Golden, section 3), at least in float32: y (d,) is
        h^(layer)_{n-1}, or its final norm for the profile golden. ``reconstruction_error`` measures that equation.

    Raises:
        UnsupportedModelError: the model's architecture has no detach table.
    """
    return dense_map(Replay(model, ids, layer=layer, profile=profile))


def ordinary_jacobian(model: PreTrainedModel, ids: tuple[int, ...], *, layer: int, profile: Profile) -> DenseMap:
    """The Jacobian dh^(layer)_{n-1}/dx_i, (n, d, d), of the model as it is, by autograd. ``offset`` is left at 0.

    Inside a ``with detached(model)`` block, the gradients are the detached ones, and so is this Jacobian: computed
    without a replay, it is what :func:`detached_jacobian` is tested against.
    """
    embeddings = embed(model, torch.tensor(ids, device=model.get_input_embeddings().weight.device))
    n, d = embeddings.shape
    rows = min(VECTORS_PER_PASS, d)
    # One copy of the prompt per row of a pass: each copy gets the gradient of its own output component.
    copies = embeddings.expand(rows, n, d).clone().requires_grad_(True)
    with torch.enable_grad():
        received, y = input_and_target(model, copies, layer=layer, profile=profile)

    def vjp(cotangents: torch.Tensor) -> torch.Tensor:
        (gradients,) = torch.autograd.grad(y, received, cotangents, retain_graph=True)
        return gradients

    x = block_input(model, embeddings)
    return DenseMap(_stack_rows(vjp, n, d, rows, x), x, y[0].detach(), torch.zeros_like(x[0]))


def _stack_rows(
    vjp: Callable[[torch.Tensor], torch.Tensor],
    n: int,
    d: int,
    rows: int,
    reference: torch.Tensor,
) -> torch.Tensor:
    """J (n, d, d), with dtype and device of ``reference``, from ceil(d / rows) VJPs of ``rows`` unit vectors each."""
    blocks = reference.new_empty(n, d, d)
    for start in range(0, d, rows):
        count = min(rows, d - start)
        # Every pass has the same shape: in a short last one, the cotangents beyond ``count`` are zero.
        cotangents = reference.new_zeros(rows, d)
        cotangents[torch.arange(count), start + torch.arange(count)] = 1.0
        blocks[:, start : start + count] = vjp(cotangents)[:count].transpose(0, 1)
    return blocks
