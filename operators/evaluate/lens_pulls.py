"""The lens: how far a push at some positions moves what the model puts out at later ones, with all else frozen.

    J̄ = E over texts of sum_{s in P} sum_{t >= max(s, 1)} dout_t/dh_s        (d, d)

h_s the input of block ``layer`` at position s, out_t the final norm's output, the derivative the detached one. A word w
with unembedding row W_U[w] is pushed along J̄ᵀ (W_U[w] - mean of W_U). The matrix is not formed: some words need their
own rows alone, and the frozen texts are kept for the next ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from operators.builder.concept import concept_from_text
from operators.core.positions import Positions
from operators.core.progress import Progress, silent
from operators.maps.detach import recording, replaying
from operators.model.loading import LoadedModel, decoder_layers, embed, final_norm

_ROWS = 64
"""Cotangents that are pulled at a time."""


class LensPulls:
    """J̄ᵀ of neutral texts, as a product. Keeps the frozen factors of every text."""

    def __init__(self, loaded: LoadedModel, texts: Sequence[str], layer: int, *, progress: Progress = silent) -> None:
        """Raises :class:`UnsupportedModelError` where the model's architecture has no detach table."""
        self._graphs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for done, text in enumerate(texts, 1):
            self._graphs.append(_frozen(loaded, concept_from_text(text, loaded).ids, layer))
            progress("texts frozen", done, len(texts))

    def pull(self, cotangents: torch.Tensor, positions: Sequence[Positions]) -> list[torch.Tensor]:
        """J̄ᵀ u, (k, d) float32, of the k rows u of ``cotangents`` (k, d), for each P of ``positions``."""
        sums = [torch.zeros_like(cotangents, dtype=torch.float32) for _ in positions]
        for hidden, out in self._graphs:
            n = hidden.shape[1]
            slices = [one.among(0, n, prompt_tokens=n) for one in positions]
            for first in range(0, len(cotangents), _ROWS):
                part = cotangents[first : first + _ROWS].to(out)
                wide = part[:, None, None].repeat(1, 1, n, 1)
                # Not at the first position: every text begins alike, and what is put out there is never asked for.
                wide[:, :, 0] = 0.0
                (gradients,) = torch.autograd.grad(out, hidden, wide, retain_graph=True, is_grads_batched=True)
                for total, at in zip(sums, slices, strict=True):
                    total[first : first + _ROWS] += gradients[:, 0, at].sum(1)
        return [total / len(self._graphs) for total in sums]


def _frozen(loaded: LoadedModel, ids: tuple[int, ...], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The affine map from h (1, n, d) to out (1, n, d) at one text, as a graph for autograd made at h = 0."""
    model = loaded.model
    embeddings = embed(model, torch.tensor([ids], device=loaded.device))
    with torch.no_grad(), recording(model) as tape:
        model.get_decoder()(inputs_embeds=embeddings, use_cache=False)
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    zero = torch.zeros(1, len(ids), loaded.hidden_size, dtype=dtype, device=loaded.device, requires_grad=True)
    with torch.enable_grad(), replaying(model, tape):
        hidden: torch.Tensor = zero
        for block in decoder_layers(model)[layer:]:
            hidden = block(hidden)
        return zero, final_norm(model)(hidden)
