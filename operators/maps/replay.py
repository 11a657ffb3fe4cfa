"""Frozen replay: the detached map of one prompt, applied and transposed without being formed.

One forward pass at the prompt records every frozen factor: 1/RMS of the norms, gates, attention weights. With these
held constant, the first ``layer`` blocks are an affine function of their input X (n, d),

    f(X) = sum_i J_i x_i + c,        J_i (d, d),  c (d,),

and at the prompt's own block input it is the model's hidden state (Golden, section 3). Hence, for batches of l vectors,

    JVP   J V   = f(V) - f(0),    V (l, n, d) -> (l, d)       forward passes of f
    VJP   J^T U                   U (l, d)    -> (l, n, d)    backward passes of f
          c     = f(0)            zero for a model without biases

When it holds: the equality is exact up to rounding, for tangents and cotangents of any size. For an X other than the
prompt's, f(X) is not what the model computes: there the factors would be others.

Cost: one forward pass of the model to record, one of f for c, the reconstruction and the last term. Then l vectors
take ceil(l / g) passes of f, where g is ``vectors_per_pass`` or fewer for a long prompt. A pass of f is matrix products
only: no queries, keys, gates, softmax or norm statistics, and in the last block only the last position beyond the
values of attention. ``torch.func.jvp`` through the detached model gives the same numbers and computes all of these
again for every tangent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from operators.core.header import Profile
from operators.maps.detach import recording, replaying, rounded_to
from operators.model.loading import block_input, decoder_layers, embed, final_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VECTORS_PER_PASS = 64
"""Upper bound of the tangents or cotangents in one pass: larger batches do not speed up the matrix products."""

_POSITIONS_PER_PASS = 1024
"""Upper bound of vectors times positions in one pass: the products are large by then, and their temporaries small."""


class AffineMap(Protocol):
    """x -> sum_i J_i x_i + c for n block inputs x_i (d,), given by its products and not by its matrices."""

    y: torch.Tensor
    """(d,), its value at the texts that it belongs to."""
    offset: torch.Tensor
    """(d,) = c."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        ...

    def jvp(self, tangents: torch.Tensor) -> torch.Tensor:
        """J V, shape (l, d), for V (l, n, d)."""
        ...

    def vjp(self, cotangents: torch.Tensor) -> torch.Tensor:
        """J^T U, shape (l, n, d), for U (l, d)."""
        ...


class Replay:
    """The map from block inputs (n, d) to the target (d,) at the last position, for one prompt and layer.

    Attributes:
        x: (n, d), the prompt's block input.
        y: (d,), the target that the model computes for it (:func:`target_hidden_state`).
        offset: (d,) = c, zero without biases.
        products: how many tangents and cotangents have been multiplied so far.

    Tensors are at least float32: a bfloat16 model's weights are widened as they are used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: tuple[int, ...],
        *,
        layer: int,
        profile: Profile,
        vectors_per_pass: int = VECTORS_PER_PASS,
        on_products: Callable[[int], None] | None = None,
    ) -> None:
        """Records the frozen factors of ``ids``.

        Args:
            layer: the target is h^(layer), from 1 to L.
            vectors_per_pass: upper bound of the vectors in one pass; memory grows with it.
            on_products: called after each pass with the number of vectors that it multiplied.

        Raises:
            UnsupportedModelError: the model's architecture has no detach table.
        """
        self._model, self._layer, self._profile = model, layer, profile
        device = model.get_input_embeddings().weight.device
        embeddings = embed(model, torch.tensor(ids, device=device))
        with torch.no_grad(), recording(model) as self._tape:
            y = target_hidden_state(model, embeddings[None], layer=layer, profile=profile)[0]
        dtype = torch.promote_types(y.dtype, torch.float32)
        self.y = y.to(dtype)
        self.x = block_input(model, embeddings).to(dtype)
        self._vectors_per_pass = group_size(vectors_per_pass, len(ids))
        self._graph: tuple[torch.Tensor, torch.Tensor] | None = None
        self._graph_rounded_to: torch.dtype | None = None
        self._on_products = on_products
        self.products = 0
        # In one pass, which takes hardly longer than that of one of them: the weights are read once.
        columns = torch.zeros_like(self.x).repeat(3, 1, 1)
        columns[1], columns[2, -1] = self.x, self.x[-1]
        with torch.no_grad():
            values = torch.cat([self._forward(group) for group in self._split(columns)])
        self.offset, self._value = values[0], values[1]
        self._last_term = values[2] - values[0]
        self._has_offset = bool(self.offset.any())

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return int(self.x.shape[0]), int(self.x.shape[1])

    def jvp(self, tangents: torch.Tensor) -> torch.Tensor:
        """J V, shape (l, d), for V (l, n, d)."""
        outputs = []
        for group in self._split(tangents):
            with torch.no_grad():
                outputs.append(self._forward(group))
            self._count(len(group))
        values = torch.cat(outputs)
        return values - self.offset if self._has_offset else values

    def vjp(self, cotangents: torch.Tensor) -> torch.Tensor:
        """J^T U, shape (l, n, d), for U (l, d)."""
        if self._graph is None or self._graph_rounded_to != rounded_to():
            # The graph of an affine map holds only constants, so that one made at zero serves every cotangent.
            self._graph = None
            self._graph_rounded_to = rounded_to()
            zero = self.x.new_zeros(1, *self.shape, requires_grad=True)
            with torch.enable_grad():
                self._graph = zero, self._forward(zero)
        inputs, output = self._graph
        # Written where they stay: the products of a sketch are its largest array.
        products = cotangents.new_empty(len(cotangents), *self.shape)
        done = 0
        for group in self._split(cotangents):
            (gradient,) = torch.autograd.grad(output, inputs, group[:, None], retain_graph=True, is_grads_batched=True)
            products[done : done + len(group)] = gradient[:, 0]
            done += len(group)
            self._count(len(group))
        return products

    def reconstruction(self) -> torch.Tensor:
        """sum_i J_i x_i + c = f(x), shape (d,): equal to ``y`` up to rounding."""
        return self._value

    def last_term(self) -> torch.Tensor:
        """J_{n-1} x_{n-1}, shape (d,)."""
        return self._last_term

    def _split(self, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Groups of even size: a short last pass would take nearly as long as a full one."""
        groups = math.ceil(len(vectors) / self._vectors_per_pass)
        return torch.split(vectors, max(1, math.ceil(len(vectors) / max(1, groups))))

    def _count(self, vectors: int) -> None:
        self.products += vectors
        if self._on_products is not None:
            self._on_products(vectors)

    def _forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """f, shape (l, d), for inputs (l, n, d)."""
        hidden = inputs
        blocks = decoder_layers(self._model)[: self._layer]
        with replaying(self._model, self._tape, final=blocks[-1]):
            for block in blocks:
                hidden = block(hidden)
            return _target(self._model, hidden, self._profile)


def group_size(vectors_per_pass: int, n: int) -> int:
    """How many vectors of a text of n tokens go through the model at a time, of at most ``vectors_per_pass``."""
    return max(1, min(vectors_per_pass, _POSITIONS_PER_PASS // n))


def target_hidden_state(
    model: PreTrainedModel,
    embeddings: torch.Tensor,
    *,
    layer: int,
    profile: Profile,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """The map's target at the last position, (batch, d), for token embeddings (batch, n, d).

    ``residual``: h^(layer), the stream entering block ``layer``. ``golden``: the model's final norm applied to
    it. Blocks from ``layer`` on are not run. ``lengths``: of each text, where shorter ones are padded at their end;
    None means n.
    """
    return input_and_target(model, embeddings, layer=layer, profile=profile, lengths=lengths)[1]


def input_and_target(
    model: PreTrainedModel,
    embeddings: torch.Tensor,
    *,
    layer: int,
    profile: Profile,
    lengths: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first block received (batch, n, d), and :func:`target_hidden_state`: the gradient of one with respect
    to the other is J, whatever the decoder does to embeddings before its first block."""
    layers = decoder_layers(model)
    received: list[torch.Tensor] = []
    streams: list[torch.Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received.append(args[0] if args else kwargs["hidden_states"])

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(args[0] if args else kwargs["hidden_states"])
        raise _TargetReached

    # The stream that leaves the last block is the one that enters the final norm.
    last = layers[layer] if layer < len(layers) else final_norm(model)
    hooks = [
        module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in ((layers[0], keep), (last, stop))
    ]
    try:
        model.get_decoder()(inputs_embeds=embeddings, use_cache=False)
    except _TargetReached:
        pass
    finally:
        for handle in hooks:
            handle.remove()
    return received[0], _target(model, streams[0], profile, lengths)


def _target(
    model: PreTrainedModel, stream: torch.Tensor, profile: Profile, lengths: Sequence[int] | None = None
) -> torch.Tensor:
    """The target, (batch, d), of a stream (batch, n, d)."""
    last = stream[:, -1]
    if lengths is not None:
        last = stream[torch.arange(len(lengths)), torch.tensor(lengths) - 1]
    target: torch.Tensor = final_norm(model)(last) if profile == "golden" else last
    return target


class _TargetReached(Exception):  # noqa: N818 - not an error: it ends the forward pass at the target layer
    pass
