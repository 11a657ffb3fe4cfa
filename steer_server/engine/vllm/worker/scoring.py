"""Scores: the last hidden states that a worker keeps of two requests, and the divergence of their distributions.

A long text is scored a few positions at a time (``worker_protocol.positions_per_call``), so that the tokens of other
requests are decoded in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(eq=False)
class KeptStates:
    """Last hidden states of one request, (d,) each, from position ``first`` on."""

    first: int
    states: list[torch.Tensor] = field(default_factory=list)

    def add(self, states: torch.Tensor, first: int) -> None:
        """Adds ``states`` (T, d) of positions ``first``...; those that are kept already, or follow a gap, are not."""
        num_kept = self.first + len(self.states) - first
        if num_kept >= 0:
            self.states.extend(states[num_kept:].unbind())


def score_states(
    compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
    steered: KeptStates,
    plain: KeptStates,
    ids: Sequence[int],
    start: int,
) -> tuple[list[float], list[float]]:
    """KL(plain || steered) in nats and log p_plain of each token in ``ids``, those of a text from ``start`` on.

    Args:
        compute_logits: logits (T, V) of states (T, d); None where another rank of the engine has them.

    Returns:
        One number per token each; both empty where another rank has the logits.

    Raises:
        ValueError: a state was not kept.
    """
    states = [kept.states[start : start + len(ids)] for kept in (plain, steered)]
    if any(len(part) != len(ids) for part in states):
        num_plain, num_steered = map(len, states)
        raise ValueError(f"{len(ids)} tokens are to be scored; {num_steered} and {num_plain} states were kept")
    with torch.inference_mode():
        plain_logits, steered_logits = (compute_logits(torch.stack(part)) for part in states)
        if plain_logits is None or steered_logits is None:
            return [], []
        log_p, log_q = (logits.float().log_softmax(-1) for logits in (plain_logits, steered_logits))
        # Rounding can leave a tiny negative sum where the two are the same.
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)
        tokens = torch.tensor(ids, device=log_p.device)
        return kl.tolist(), log_p.gather(-1, tokens[:, None]).squeeze(-1).tolist()
