"""What one operator adds along one sequence: its directions, at the positions of its setting and nowhere else."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from operators.core.apply import Direction, PreparedOperator, Setting, advance_directions


class SequencePushes:
    """The pushes (lambda/2) d_k/|d_k| of one operator along one sequence, at the positions k of its setting.

    Feed it every token of the sequence once, in order, until it is ``over``.
    """

    def __init__(self, operator: PreparedOperator, setting: Setting, *, prompt_tokens: int) -> None:
        """``prompt_tokens``: how many tokens of the sequence are its prompt."""
        self.bound = abs(setting.strength) / 2.0
        """The relative dose that this operator alone can give."""
        self._half_strength = setting.strength / 2.0
        self._positions, self._prompt_tokens = setting.positions, prompt_tokens
        self._direction = Direction(operator, setting)

    @property
    def over(self) -> bool:
        """Whether no position from here on is pushed: then nothing is left to be computed."""
        _, end = self._positions.interval(self._prompt_tokens)
        return end is not None and self._direction.position >= end

    @property
    def group(self) -> Hashable:
        """Equal for those that :func:`advance_pushes` takes at once: they differ by their strengths only."""
        return self._direction.group, self._positions, self._prompt_tokens

    def advance(self, x: torch.Tensor) -> tuple[slice, torch.Tensor]:
        """:func:`advance_pushes` of one sequence: embeddings (T, d), and pushes (P, d)."""
        at, pushes = advance_pushes([self], x[None])
        return at, pushes[0]


def advance_pushes(sequences: Sequence[SequencePushes], x: torch.Tensor) -> tuple[slice, torch.Tensor]:
    """Which of the next T tokens of N sequences of one ``group`` are pushed, and their pushes (N, P, d) float32.

    The tokens of one call that are pushed follow one another. Where P is 0, they enter the running sums alone.

    Args:
        x: the tokens' embeddings (N, T, d).

    Raises:
        SteeringError: a direction is zero or not finite at a position that is pushed.
    """
    one = sequences[0]
    position = one._direction.position
    at = one._positions.among(position, x.shape[1], prompt_tokens=one._prompt_tokens)
    if one.over:
        return at, x.new_empty(len(sequences), 0, x.shape[2], dtype=torch.float32)
    directions = advance_directions([sequence._direction for sequence in sequences], x, at)
    halves = torch.tensor([sequence._half_strength for sequence in sequences], device=x.device)
    return at, halves[:, None, None] * directions
