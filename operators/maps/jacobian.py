"""The detached Jacobian of a model at one prompt, exact.

With everything but the linear path frozen, the residual stream entering block s is

    h^(s)_{n-1} = sum_i J_i x_i + c,        J_i = dh^(s)_{n-1} / dx_i   (detached)

(Golden, section 3), with c = 0 for a model without biases. The equality is exact up to rounding: about 1e-6 in float32
and 1e-15 in float64; the same sum with the ordinary Jacobian is not even close.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from operators.core.header import Profile
from operators.maps.replay import Map, Replay, hidden_state
from operators.model.loading import block_input, embed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS_PER_PASS = 64


@dataclass(frozen=True, eq=False)
class LinearMap:
    """J (n, d, d), with ``jacobian[i] = dh/dx_i`` (output, input); x (n, d); y (d,) = h at the last token; c (d,)."""

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
        """|sum J x + c - y| / |y|."""
        return relative_error(self.reconstruction, self.y)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference|, in float64."""
    reference = reference.double()
    return float(torch.linalg.vector_norm(value.double() - reference) / torch.linalg.vector_norm(reference))


def exact(concept: Map, *, columns: int = _ROWS_PER_PASS) -> torch.Tensor:
    """J (n, d, d) of any map, row by row: ceil(d / columns) pulls."""
    n, d = concept.shape
    rows = min(columns, d)
    return _rows(concept.pull, n, d, rows, concept.y)


def detached_jacobian(model: PreTrainedModel, ids: tuple[int, ...], *, layer: int, profile: Profile) -> LinearMap:
    """The detached Jacobian at layer ``layer`` for the prompt ``ids``, from its replay.

    Raises:
        UnsupportedModelError: the model's architecture has no table.
    """
    replay = Replay(model, ids, layer=layer, profile=profile)
    return LinearMap(exact(replay), replay.x, replay.y, replay.offset)


def jacobian(model: PreTrainedModel, ids: tuple[int, ...], *, layer: int, profile: Profile) -> LinearMap:
    """The Jacobian of whatever gradients ``model`` has now, by autograd through the model itself.

    Outside of ``detached`` the regular one; inside, the oracle for :func:`detached_jacobian` (c is left 0).
    """
    embeddings = embed(model, torch.tensor(ids, device=model.get_input_embeddings().weight.device))
    n, d = embeddings.shape
    rows = min(_ROWS_PER_PASS, d)
    copies = embeddings.expand(rows, n, d).clone().requires_grad_(True)
    with torch.enable_grad():
        y = hidden_state(model, copies, layer=layer, profile=profile)

    def pull(questions: torch.Tensor) -> torch.Tensor:
        (answers,) = torch.autograd.grad(y, copies, questions, retain_graph=True)
        return answers

    x = block_input(model, embeddings)
    return LinearMap(_rows(pull, n, d, rows, x), x, y[0].detach(), torch.zeros_like(x[0]))


def _rows(
    pull: Callable[[torch.Tensor], torch.Tensor],
    n: int,
    d: int,
    rows: int,
    like: torch.Tensor,
) -> torch.Tensor:
    """J (n, d, d) from ceil(d / rows) pulls: copy r of a pass asks for output component start + r."""
    blocks = like.new_empty(n, d, d)
    for start in range(0, d, rows):
        count = min(rows, d - start)
        # A short last pass leaves the other copies without a question.
        questions = like.new_zeros(rows, d)
        questions[torch.arange(count), start + torch.arange(count)] = 1.0
        blocks[:, start : start + count] = pull(questions)[:count].transpose(0, 1)
    return blocks
