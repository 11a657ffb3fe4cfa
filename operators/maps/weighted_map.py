"""Several texts of one concept as one operator: the mean of their maps.

The texts are laid over each other at their ends. With T texts of n_t tokens, n the longest, J^t the map of text t with
zero blocks put in front of it until it has n, and weights w_t = 1/T (a mixture has others),

    J_i = sum_t w_t J^t_i,    y = sum_t w_t y^t,    c = sum_t w_t c^t,    b = sum_t w_t (y^t - J^t_{n-1} x^t_{n-1}),

so that a direction (before it is normalised) is the mean of those that the texts give one by one: what they share
adds up, what is peculiar to one is divided by T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from operators.maps.replay import Replay


class MeanMap:
    """The weighted mean of one or more replays. ``last_term`` (d,) is that of J_{n-1} x_{n-1}."""

    def __init__(self, replays: Sequence[Replay], weights: Sequence[float]) -> None:
        self._replays = tuple(replays)
        self._weights = tuple(weights)
        self._n = max(replay.shape[0] for replay in replays)
        self.y = self._mean([replay.y for replay in replays])
        self.offset = self._mean([replay.offset for replay in replays])
        self.last_term = self._mean([_last_term(replay) for replay in replays])

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d), n of the longest text."""
        return self._n, self._replays[0].shape[1]

    def push(self, columns: torch.Tensor) -> torch.Tensor:
        """J V (l, d) for V (l, n, d)."""
        return self._mean([replay.push(columns[:, self._n - replay.shape[0] :]) for replay in self._replays])

    def pull(self, questions: torch.Tensor) -> torch.Tensor:
        """J^T U (l, n, d) for U (l, d)."""
        answers = questions.new_zeros(len(questions), *self.shape)
        for replay, weight in zip(self._replays, self._weights, strict=True):
            answers[:, self._n - replay.shape[0] :] += weight * replay.pull(questions)
        return answers

    def _mean(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        terms = [weight * value for weight, value in zip(self._weights, values, strict=True)]
        return torch.stack(terms).sum(0)


def _last_term(replay: Replay) -> torch.Tensor:
    only_last = torch.zeros_like(replay.x)
    only_last[-1] = replay.x[-1]
    return replay.push(only_last[None])[0]
