"""Frozen replay: the detached map of one prompt as passes of matrix products.

One forward pass records every frozen factor (norm scales, gates, attention weights). With them fixed, the blocks are
affine in their input, f(X) = J X + c, and run on any X:

    J V    = f(V) - f(0)            a forward pass over all columns of V at once
    J^T U  = the backward pass of f, whose graph holds constants only and is made once, of one column
    c      = f(0)

Neither pass computes a query, a key, a gate, a softmax or a norm, nor anything but the last position after the last
block's attention; what is left is GEMMs (Golden, section 3; the tangents that ``detach`` blocks in forward mode are
why this does not go through ``torch.func.jvp``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from operators.core.header import Profile
from operators.maps.detach import recording, replaying
from operators.model.loading import block_input, decoder_layers, embed, final_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_POSITIONS_PER_PASS = 1024
"""Columns go through the blocks in groups of so many positions: GEMMs are large by then, and temporaries small."""
COLUMNS_PER_PASS = 64
"""At most: more make no GEMM quicker."""


class Map(Protocol):
    """An affine map of n block inputs: what :class:`Replay` is for one text."""

    y: torch.Tensor
    """(d,), its value at the concept."""
    offset: torch.Tensor
    """(d,) = c."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        ...

    def push(self, columns: torch.Tensor) -> torch.Tensor:
        """J V (l, d) for V (l, n, d)."""
        ...

    def pull(self, questions: torch.Tensor) -> torch.Tensor:
        """J^T U (l, n, d) for U (l, d)."""
        ...


class Replay:
    """The map from block inputs x (n, d) to the target h (d,) at the last position, for one prompt and layer.

    ``x``: (n, d). ``y``: (d,), the target's value. ``offset``: (d,) = c, zero without biases. All in float32 at least:
    a bfloat16 model's weights are widened as they are used.
    ``products`` counts the columns that were pushed and pulled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: tuple[int, ...],
        *,
        layer: int,
        profile: Profile,
        columns: int = COLUMNS_PER_PASS,
        tick: Callable[[int], None] | None = None,
    ) -> None:
        """``columns``: how many go through a pass at most. ``tick`` is told of those that have."""
        self._model, self._layer, self._profile = model, layer, profile
        device = model.get_input_embeddings().weight.device
        embeddings = embed(model, torch.tensor(ids, device=device))
        with torch.no_grad(), recording(model) as self._tape:
            y = hidden_state(model, embeddings[None], layer=layer, profile=profile)[0]
        wide = torch.promote_types(y.dtype, torch.float32)
        self.y = y.to(wide)
        self.x = block_input(model, embeddings).to(wide)
        self._group = max(1, min(columns, _POSITIONS_PER_PASS // len(ids)))
        self._graph: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tick = tick
        self.products = 0
        with torch.no_grad():
            self.offset = self._run(torch.zeros_like(self.x)[None])[0]
        self._affine = bool(self.offset.any())

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return int(self.x.shape[0]), int(self.x.shape[1])

    def push(self, columns: torch.Tensor) -> torch.Tensor:
        """J V, shape (l, d), for V (l, n, d)."""
        groups = []
        for group in self._split(columns):
            with torch.no_grad():
                groups.append(self._run(group))
            self._count(len(group))
        images = torch.cat(groups)
        return images - self.offset if self._affine else images

    def pull(self, questions: torch.Tensor) -> torch.Tensor:
        """J^T U, shape (l, n, d), for U (l, d)."""
        if self._graph is None:
            # The graph of a linear map holds constants only: any column makes it, and zeros do.
            column = self.x.new_zeros(1, *self.shape, requires_grad=True)
            with torch.enable_grad():
                self._graph = column, self._run(column)
        column, image = self._graph
        answers = []
        for group in self._split(questions):
            (answer,) = torch.autograd.grad(image, column, group[:, None], retain_graph=True, is_grads_batched=True)
            answers.append(answer[:, 0])
            self._count(len(group))
        return torch.cat(answers)

    def _split(self, columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Groups of even size: a short last one is slow for what it does."""
        groups = math.ceil(len(columns) / self._group)
        return torch.split(columns, max(1, math.ceil(len(columns) / max(1, groups))))

    def _count(self, columns: int) -> None:
        self.products += columns
        if self._tick is not None:
            self._tick(columns)

    def _run(self, columns: torch.Tensor) -> torch.Tensor:
        hidden = columns
        blocks = decoder_layers(self._model)[: self._layer]
        with replaying(self._model, self._tape, final=blocks[-1]):
            for block in blocks:
                hidden = block(hidden)
            last = hidden[:, -1]
            normed: torch.Tensor = final_norm(self._model)(last) if self._profile == "golden" else last
        return normed


def hidden_state(model: PreTrainedModel, embeddings: torch.Tensor, *, layer: int, profile: Profile) -> torch.Tensor:
    """The map's target at the last position, (batch, d), for token embeddings (batch, n, d).

    ``residual``: h^(layer), the stream entering block ``layer``. ``golden``: the model's final norm applied to
    it. Blocks from ``layer`` on are not run.
    """
    layers = decoder_layers(model)
    seen: list[torch.Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    # The stream that leaves the last block is the one that enters the final norm.
    place = layers[layer] if layer < len(layers) else final_norm(model)
    hook = place.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model.get_decoder()(inputs_embeds=embeddings, use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    last = seen[0][:, -1]
    normed: torch.Tensor = final_norm(model)(last) if profile == "golden" else last
    return normed


class _Reached(Exception):  # noqa: N818 - it is no error: the wanted layer has been reached
    pass
