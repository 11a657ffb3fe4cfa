"""What a score is made of: the last hidden states that a worker keeps of two requests, and the two distributions.

A long text is scored a few positions at a time (:data:`ROWS`), between which the tokens of other requests are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

ROWS = 64
"""Positions whose logits over the vocabulary are looked at together."""


@dataclass(eq=False)
class Kept:
    """Last hidden states of one request, (d,) each, from position ``first`` on."""

    first: int
    states: list[torch.Tensor] = field(default_factory=list)

    def add(self, states: torch.Tensor, first: int) -> None:
        """``states`` (T, d) of positions first...; what is there already is not added again, nor what follows a gap."""
        known = self.first + len(self.states) - first
        if known >= 0:
            self.states.extend(states[known:].unbind())


def compare(
    logits_of: Callable[[torch.Tensor], torch.Tensor | None], steered: Kept, plain: Kept, ids: Sequence[int], at: int
) -> tuple[list[float], list[float]]:
    """KL(plain || steered) in nats and log p_plain of each token in ``ids``, those of a text from ``at`` on.

    Args:
        logits_of: logits (T, vocabulary) of states (T, d); None where another rank of the engine has them.

    Returns:
        A number per token each; nothing where another rank has the logits.

    Raises:
        ValueError: a state was not kept.
    """
    states = [kept.states[at : at + len(ids)] for kept in (plain, steered)]
    if any(len(some) != len(ids) for some in states):
        theirs, ours = map(len, states)
        raise ValueError(f"{len(ids)} tokens are to be scored; {ours} and {theirs} states were kept")
    with torch.inference_mode():
        p, q = (logits_of(torch.stack(some)) for some in states)
        if p is None or q is None:
            return [], []
        p, q = (each.float().log_softmax(-1) for each in (p, q))
        # Rounding can leave a tiny negative sum where the two are the same.
        kl = (p.exp() * (p - q)).sum(-1).clamp_min(0.0)
        tokens = torch.tensor(ids, device=p.device)
        return kl.tolist(), p.gather(-1, tokens[:, None]).squeeze(-1).tolist()
