"""Which positions of a forward pass get logits."""

from __future__ import annotations

import torch


def last_positions(ids: torch.Tensor, count: int = 1) -> torch.Tensor:
    """transformers' ``logits_to_keep`` for the last ``count`` positions of ``ids`` (B, T): their indices, (count,).

    A number would do, but gives the unembedding a slice of the hidden states, whose rows are apart in memory: for many
    rows that product takes several times as long on a CPU as one of a copy.
    """
    width = ids.shape[1]
    return torch.arange(width - count, width, device=ids.device)
