"""A lens of some words alone, at any positions, without its matrix.

    J̄ = E over texts of sum_{s in P} G_s            (d, d), G_s of :mod:`operators.lens.pulls`

A word w with unembedding row W_U[w] is pushed along J̄ᵀ (W_U[w] - mean of W_U). Some words need their own rows alone,
and the frozen texts are kept for the next ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from operators.builder.concept import concept_from_text
from operators.core.positions import Positions
from operators.core.progress import Progress, silent
from operators.lens.pulls import freeze_text
from operators.model.loading import LoadedModel


class WordPulls:
    """J̄ᵀ of neutral texts, as a product. Keeps the frozen factors of every text."""

    def __init__(self, loaded: LoadedModel, texts: Sequence[str], layer: int, *, progress: Progress = silent) -> None:
        """Raises :class:`BuildError` and :class:`UnsupportedModelError` as :func:`operators.lens.pulls.freeze_text`."""
        self._frozen = []
        for done, text in enumerate(texts, 1):
            self._frozen.append(freeze_text(loaded.model, concept_from_text(text, loaded).ids, [layer]))
            progress("texts frozen", done, len(texts))

    def pull(self, cotangents: torch.Tensor, positions: Sequence[Positions]) -> list[torch.Tensor]:
        """J̄ᵀ u, (k, d) float32, of the k rows u of ``cotangents`` (k, d), for each P of ``positions``."""
        sums = [torch.zeros_like(cotangents, dtype=torch.float32) for _ in positions]
        for frozen in self._frozen:
            n = len(frozen.at_prompt)
            slices = [one.among(0, n, prompt_tokens=n) for one in positions]
            for rows, (gradient,) in frozen.pulls(cotangents.to(frozen.output)):
                for total, at in zip(sums, slices, strict=True):
                    total[rows] += gradient[:, at].sum(1)
        return [total / len(self._frozen) for total in sums]
