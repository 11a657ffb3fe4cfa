"""Choosing the next tokens of many texts, as ``generate`` of transformers and both engines choose them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from operators.core.measured import Sampling

GREEDY = Sampling(repetition_penalty=1.0)


class TokenChoice:
    """The repetition penalty, and a random generator for each text: what it draws depends on its prompt alone.

    A text is the same in any batch, and steered and plain texts of one prompt draw the same numbers.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self._sampling, self._prompts, self._device = sampling, prompts, device
        self._seen: torch.Tensor | None = None
        """(R, V) bool: the tokens of each text so far, its prompt's included. Made with the first logits."""
        self._generators = [torch.Generator().manual_seed(_seed(sampling.seed, ids)) for ids in prompts]

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token (R,) of each text, from its logits (R, V) in float32 or finer."""
        penalty, temperature = self._sampling.repetition_penalty, self._sampling.temperature
        scores = logits
        if penalty != 1.0:
            if self._seen is None:
                self._seen = torch.zeros(logits.shape, dtype=torch.bool, device=self._device)
                for row, ids in enumerate(self._prompts):
                    self._seen[row, list(ids)] = True
            scores = torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        chosen = scores.argmax(-1) if temperature == 0.0 else self._draw(scores / temperature)
        if self._seen is not None:
            self._seen[torch.arange(len(chosen), device=self._device), chosen] = True
        return chosen

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        ordered, ids = scores.softmax(-1).sort(-1, descending=True)
        below = ordered.cumsum(-1)
        # The tokens up to the one that reaches top-p; always the first.
        ordered = torch.where(below - ordered < self._sampling.top_p, ordered, 0.0)
        below = ordered.cumsum(-1)
        drawn = torch.tensor([float(torch.rand((), generator=generator)) for generator in self._generators])
        places = torch.searchsorted(below, (drawn.to(below) * below[:, -1])[:, None], right=True)
        return ids.gather(-1, places.clamp_max(ids.shape[1] - 1))[:, 0]


def _seed(seed: int, ids: tuple[int, ...]) -> int:
    digest = hashlib.sha256(repr((seed, ids)).encode()).digest()
    return int.from_bytes(digest[:7], "little")
