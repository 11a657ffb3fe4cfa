"""Scores: the last hidden states that a worker keeps of two requests, and the divergence of their distributions.

A long text is scored a few positions at a time (``worker_protocol.positions_per_call``), so that the tokens of other
requests are decoded in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from steer_server.engine.distributions import NO_REPORT, compare_positions
from steer_server.types import Report, Score


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
    report: Report = NO_REPORT,
) -> list[Score]:
    """The tokens ``ids`` of a text, from its token ``start`` on, under both requests.

    Args:
        compute_logits: logits (T, V) of states (T, d); None where another rank of the engine has them.

    Returns:
        One entry per token; none where another rank has the logits.

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
            return []
        return compare_positions(plain_logits, steered_logits, ids, report)
