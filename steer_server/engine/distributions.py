"""Two distributions over the next token, position by position: the plain model's and a row's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steer_server.types import Report, Score

NO_REPORT = Report()


def compare_positions(
    plain: torch.Tensor, row: torch.Tensor, ids: Sequence[int], report: Report = NO_REPORT
) -> list[Score]:
    """What the logits (T, V) of both say of the tokens ``ids`` (T,) that follow them. Works in float32."""
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (plain, row))
    p = log_p.exp()
    # Rounding can leave a tiny negative sum where the two are the same.
    kl = (p * (log_p - log_q)).sum(-1).clamp_min(0.0).tolist()
    at = torch.tensor(ids, device=log_p.device)[:, None]
    own = [each.gather(-1, at)[:, 0].tolist() for each in (log_p, log_q)]
    top = [_likeliest(each, report.top) for each in (log_p, log_q)]
    masses = _masses(p, log_q, report.words)
    return [
        Score(kl[t], own[0][t], own[1][t], _missing(top[1][t], top[0][t]), _missing(top[0][t], top[1][t]), masses[t])
        for t in range(len(ids))
    ]


def plain_scores(logprobs: Sequence[float]) -> tuple[Score, ...]:
    """Those of the tokens of a plain text, from their own log-probabilities."""
    return tuple(Score(0.0, logprob, logprob) for logprob in logprobs)


def score_of(fields: Sequence[Any]) -> Score:
    """A score whose fields have travelled between processes, which makes lists of tuples."""
    kl, plain, own, *parts = fields
    return Score(kl, plain, own, *(tuple((one, other) for one, other in part) for part in parts))


def _likeliest(logprobs: torch.Tensor, count: int) -> list[dict[int, float]]:
    """Of each position, the ``count`` likeliest tokens and their log-probabilities."""
    if not count:
        return [{}] * len(logprobs)
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]))
    return [dict(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]


def _missing(of: dict[int, float], there: dict[int, float]) -> tuple[tuple[int, float], ...]:
    return tuple((token, logprob) for token, logprob in of.items() if token not in there)


def _masses(p: torch.Tensor, log_q: torch.Tensor, words: Sequence[Sequence[int]]) -> list[tuple[Any, ...]]:
    """Of each position and word, its probability under both."""
    if not words:
        return [()] * len(p)
    both = [(p[:, list(word)].sum(-1).tolist(), log_q[:, list(word)].exp().sum(-1).tolist()) for word in words]
    return [tuple((plain[t], own[t]) for plain, own in both) for t in range(len(p))]
