"""What one operator adds along one sequence: its directions, at the positions of its setting and nowhere else."""

from __future__ import annotations

import torch

from operators.core.apply import Direction, PreparedOperator, Setting


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
        self._position = 0

    @property
    def over(self) -> bool:
        """Whether no position from here on is pushed: then nothing is left to be computed."""
        _, end = self._positions.interval(self._prompt_tokens)
        return end is not None and self._position >= end

    def advance(self, x: torch.Tensor) -> tuple[slice, torch.Tensor]:
        """Which of the next T tokens, whose embeddings are ``x`` (T, d), are pushed, and their pushes (P, d) float32.

        The tokens of one call that are pushed follow one another. Where P is 0, they enter the running sum alone.

        Raises:
            SteeringError: a direction is zero or not finite at a position that is pushed.
        """
        at = self._positions.among(self._position, x.shape[0], prompt_tokens=self._prompt_tokens)
        if self.over:
            return at, x.new_empty(0, x.shape[1], dtype=torch.float32)
        self._position += x.shape[0]
        return at, self._half_strength * self._direction.advance(x, at)
