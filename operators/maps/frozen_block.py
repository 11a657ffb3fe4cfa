"""One decoder block at a time: recorded for a text, and applied to batches of vectors.

A block at a text is affine in the stream that it receives, as the whole model is (``replay``), and the model's map is
that of its blocks one after the other. So whatever is done to many vectors can be done block by block.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from operators.maps.detach import Tape, recording, replaying
from operators.model.loading import decoder_layers, embed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BlockCall:
    """What a decoder gives to a block beside the stream: masks, positions, rotary factors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, stream: torch.Tensor) -> torch.Tensor:
        """The stream (b, n, d) that leaves the block."""
        output: torch.Tensor = block(stream, *self.args, **self.kwargs)
        return output


def block_calls(model: PreTrainedModel, ids: torch.Tensor, layer: int) -> tuple[torch.Tensor, list[BlockCall]]:
    """What the first block receives, (b, n, d), for token ids (b, n), and how each of ``layer`` blocks is called.

    No block is computed.
    """
    blocks, received, calls = decoder_layers(model), [], []

    def note(stream: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        received.append(stream)
        calls.append(BlockCall(args, kwargs))
        return stream

    def from_names(*args: Any, **kwargs: Any) -> torch.Tensor:
        return note(*args, **kwargs) if args else note(kwargs.pop("hidden_states"), **kwargs)

    with ExitStack() as undo, torch.no_grad():
        for block in blocks:
            undo.callback(delattr, block, "forward")
            block.forward = from_names
        model.get_decoder()(inputs_embeds=embed(model, ids), use_cache=False)
    return received[0], calls[:layer]


def record(
    model: PreTrainedModel, block: nn.Module, call: BlockCall, stream: torch.Tensor
) -> tuple[Tape, torch.Tensor]:
    """The block's frozen factors at a text, and the stream (1, n, d) that leaves it."""
    with torch.no_grad(), recording(model, within=block) as tape:
        return tape, call(block, stream)


class FrozenBlock:
    """The affine map of a recorded block, for batches of vectors, ``vectors_per_pass`` at a time.

    ``last``: of the block's output only the last position is needed.
    """

    def __init__(
        self, model: PreTrainedModel, block: nn.Module, tape: Tape, *, last: bool, vectors_per_pass: int
    ) -> None:
        self._block, self._last, self._size = block, last, vectors_per_pass
        self._replaying = partial(replaying, model, tape, within=block, final=block if last else None)

    def push(self, streams: torch.Tensor) -> torch.Tensor:
        """f(X), for X (l, n, d) in the same place; for the last block (l, d)."""
        outputs = []
        with torch.no_grad(), self._replaying():
            for group in torch.split(streams, self._size):
                output = self._block(group)
                if self._last:
                    outputs.append(output[:, -1].clone())
                else:
                    group.copy_(output)
        return torch.cat(outputs) if self._last else streams

    def pull(self, cotangents: torch.Tensor, n: int) -> torch.Tensor:
        """A^T U (l, n, d) for f(X) = A X + c and U (l, n, d), in the same place; for the last block U is (l, d)."""
        # The graph of an affine map holds only constants, so that one made at zero serves every cotangent.
        zero = cotangents.new_zeros(1, n, cotangents.shape[-1], requires_grad=True)
        with torch.enable_grad(), self._replaying():
            output = self._block(zero)
            output = output[:, -1] if self._last else output
        pulled = cotangents.new_empty(len(cotangents), n, cotangents.shape[-1]) if self._last else cotangents
        for start in range(0, len(cotangents), self._size):
            group = cotangents[start : start + self._size, None]
            (gradient,) = torch.autograd.grad(output, zero, group, retain_graph=True, is_grads_batched=True)
            pulled[start : start + self._size] = gradient[:, 0]
        return pulled
