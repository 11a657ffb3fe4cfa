"""Frozen replay: the detached map of one prompt as passes of matrix products.

One forward pass records every frozen factor (norm scales, gates, attention weights). With them fixed, the blocks are
affine in their input, f(X) = J X + c, and run on any X:

    J V    = f(V) - f(0)            a forward pass over all columns of V at once
    J^T U  = the backward pass of f, whose graph holds constants only
    c      = f(0)

Neither pass computes a query, a key, a gate, a softmax or a norm; what is left is GEMMs (Golden, section 3; the
tangents that ``detach`` blocks in forward mode are why this does not go through ``torch.func.jvp``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from operators.artifact import Profile
from operators.detach import recording, replaying
from operators.models import block_input, decoder_layers, embed, final_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pull = Callable[[torch.Tensor], torch.Tensor]
"""U (l, d) to J^T U (l, n, d)."""


class Replay:
    """The map from block inputs x (n, d) to the target h (d,) at the last position, for one prompt and layer.

    ``x``: (n, d). ``y``: (d,), the target's value. ``offset``: (d,) = c, zero without biases.
    ``products`` counts the columns that went through a pass, forward or backward.
    """

    def __init__(self, model: PreTrainedModel, ids: tuple[int, ...], *, layer: int, profile: Profile) -> None:
        self._model, self._layer, self._profile = model, layer, profile
        device = model.get_input_embeddings().weight.device
        embeddings = embed(model, torch.tensor(ids, device=device))
        with torch.no_grad(), recording(model) as self._tape:
            self.y = hidden_state(model, embeddings[None], layer=layer, profile=profile)[0]
        self.x = block_input(model, embeddings)
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
        with torch.no_grad():
            return self._linear(columns)

    def push_and_pull(self, columns: torch.Tensor) -> tuple[torch.Tensor, Pull]:
        """J V, and J^T for as many columns as V has: its graph is the one that J V leaves behind.

        The pull may be called often; it holds the graph until it is dropped.
        """
        columns = columns.detach().requires_grad_(True)
        with torch.enable_grad():
            images = self._linear(columns)

        def pull(questions: torch.Tensor) -> torch.Tensor:
            self.products += len(questions)
            (answers,) = torch.autograd.grad(images, columns, questions, retain_graph=True)
            return answers

        return images.detach(), pull

    def _linear(self, columns: torch.Tensor) -> torch.Tensor:
        self.products += len(columns)
        images = self._run(columns)
        return images - self.offset if self._affine else images

    def _run(self, columns: torch.Tensor) -> torch.Tensor:
        hidden = columns
        with replaying(self._model, self._tape):
            for block in decoder_layers(self._model)[: self._layer]:
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
