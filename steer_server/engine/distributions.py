"""Two distributions over the next token, position by position: the plain model's and a row's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

PositionScore = tuple[float, float, float]
"""KL(plain || row), log p_plain(token) and log p_row(token), in nats: the fields of :class:`.events.Score`."""


def compare_positions(plain: torch.Tensor, row: torch.Tensor, ids: Sequence[int]) -> list[PositionScore]:
    """What the logits (T, V) of both say of the tokens ``ids`` (T,) that follow them. Works in float32."""
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (plain, row))
    # Rounding can leave a tiny negative sum where the two are the same.
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)
    at = torch.tensor(ids, device=log_p.device)[:, None]
    return list(zip(kl.tolist(), *(each.gather(-1, at)[:, 0].tolist() for each in (log_p, log_q)), strict=True))
