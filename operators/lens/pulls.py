"""The matrices of a lens, text by text: how the outputs of all later positions pull on a hidden state.

With everything but the linear path frozen (:mod:`operators.maps.detach`), the blocks from ``layer`` on and the final
norm are, at one text of n tokens, an affine function of the block's input h (n, d). With out_t the final norm's output
at position t, summed over the positions behind the first,

    o = sum_{t>=1} out_t = sum_s G_s h_s + c          exactly, up to rounding
    G_s = sum_{t>=max(s,1)} d out_t / d h_s            (d, d), output by input

``first`` is G_0 and ``others`` is sum_{s>=1} G_s. One backward pass gives a row of G_s for every s, and for every layer
that it goes through: the matrices of many layers cost no more than those of the lowest one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from operators.core.errors import BuildError
from operators.maps.detach import recording, replaying
from operators.maps.jacobian import relative_error
from operators.model.loading import decoder_layers, embed, final_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VECTORS_PER_PASS = 64
_POSITIONS_PER_PASS = 1024
"""Upper bound of vectors times positions in one pass, as :mod:`operators.maps.replay` has it."""


@dataclass(frozen=True, eq=False)
class Pulls:
    """Of one text at one layer. Filled by :func:`text_pulls`; (d, d) each, output by input, in float64 on the CPU.

    For other cotangents than the identity, (m, d).
    """

    first: torch.Tensor
    others: torch.Tensor


@dataclass(frozen=True, eq=False)
class FrozenText:
    """The affine map of one text, as a graph for autograd. Filled by :func:`freeze_text`.

    ``inputs``: h (1, n, d) of every layer, ascending, made at zero; ``output``: sum_{t>=1} out_t (d,) at that input, c.
    ``at_prompt`` (n, d) and ``target`` (d,): h at the lowest layer, and o, of the text itself.
    """

    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor
    at_prompt: torch.Tensor
    target: torch.Tensor

    def pulls(self, cotangents: torch.Tensor) -> Iterator[tuple[slice, tuple[torch.Tensor, ...]]]:
        """u^T G_s (m, n, d) at every layer, for the rows u of ``cotangents`` (count, d); some rows at a time."""
        count, n = len(cotangents), len(self.at_prompt)
        passes = math.ceil(count / max(1, min(VECTORS_PER_PASS, _POSITIONS_PER_PASS // n)))
        first = 0
        for group in cotangents.chunk(passes):
            found = torch.autograd.grad(self.output, self.inputs, group, retain_graph=True, is_grads_batched=True)
            yield slice(first, first + len(group)), tuple(each[:, 0] for each in found)
            first += len(group)


def freeze_text(model: PreTrainedModel, ids: Sequence[int], layers: Sequence[int]) -> FrozenText:
    """The affine map from the inputs of ``layers`` to the later outputs, at one text of two tokens or more.

    Raises:
        BuildError: the text has one token.
        UnsupportedModelError: the model's architecture has no detach table.
    """
    if len(ids) < 2:
        raise BuildError(f"a neutral text has {len(ids)} tokens; 2 or more are needed")
    lowest = min(layers)
    device = model.get_input_embeddings().weight.device
    streams: dict[int, torch.Tensor] = {}
    blocks = decoder_layers(model)
    hook = blocks[lowest].register_forward_pre_hook(
        lambda _module, args, kwargs: streams.update({lowest: args[0] if args else kwargs["hidden_states"]}),
        with_kwargs=True,
    )
    try:
        with torch.no_grad(), recording(model) as tape:
            embeddings = embed(model, torch.tensor([list(ids)], device=device))
            recorded = model.get_decoder()(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    dtype = torch.promote_types(recorded.dtype, torch.float32)
    at_prompt = streams[lowest][0].to(dtype)
    target = recorded[0, 1:].to(dtype).sum(0)
    # The graph of an affine map holds only constants, so that one made at zero serves every cotangent.
    inputs: list[torch.Tensor] = []
    with torch.enable_grad(), replaying(model, tape):
        hidden = torch.zeros_like(at_prompt)[None].requires_grad_()
        for layer in range(lowest, len(blocks)):
            if layer in layers:
                inputs.append(hidden)
            hidden = blocks[layer](hidden)
        # Not at the first position: every text begins alike, and what is put out there is never asked for.
        output = final_norm(model)(hidden)[0, 1:].sum(0)
    return FrozenText(tuple(inputs), output, at_prompt, target)


def text_pulls(
    model: PreTrainedModel,
    ids: Sequence[int],
    layers: Sequence[int],
    *,
    cotangents: torch.Tensor | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> tuple[Mapping[int, Pulls], float]:
    """The matrices of one text at each of the layers, and |sum_s G_s h_s + c - o| / |o| at the lowest one.

    Args:
        ids: two tokens or more.
        layers: from 1 to L-1; the input of such a block is what is pulled on.
        cotangents: (m, d), whose m products u^T G are computed in place of all d rows, and the error then is of those
            numbers; None means the identity.
        on_rows: called with the number of rows after each pass.

    Raises:
        BuildError: the text has one token.
        UnsupportedModelError: the model's architecture has no detach table.
    """
    frozen = freeze_text(model, ids, layers)
    if cotangents is None:
        cotangents = torch.eye(len(frozen.output), dtype=frozen.output.dtype, device=frozen.output.device)
    cotangents = cotangents.to(frozen.output)
    rows = _rows(frozen, cotangents, on_rows)
    value = rows.reconstruction + cotangents @ frozen.output.detach()
    return dict(zip(sorted(layers), rows.pulls, strict=True)), relative_error(value, cotangents @ frozen.target)


@dataclass(frozen=True, eq=False)
class _Rows:
    pulls: list[Pulls]
    reconstruction: torch.Tensor
    """sum_s u^T G_s h_s at the lowest layer, (m,)."""


def _rows(frozen: FrozenText, cotangents: torch.Tensor, on_rows: Callable[[int], None] | None) -> _Rows:
    empty = torch.empty(cotangents.shape, dtype=torch.float64)
    found = [Pulls(empty.clone(), empty.clone()) for _ in frozen.inputs]
    reconstruction = frozen.output.new_empty(len(cotangents)).detach()
    for rows, gradients in frozen.pulls(cotangents):
        reconstruction[rows] = torch.einsum("mnd,nd->m", gradients[0], frozen.at_prompt)
        for pulls, gradient in zip(found, gradients, strict=True):
            pulls.first[rows] = gradient[:, 0].double().cpu()
            pulls.others[rows] = gradient[:, 1:].double().sum(1).cpu()
        if on_rows is not None:
            on_rows(len(gradients[0]))
    return _Rows(found, reconstruction)
