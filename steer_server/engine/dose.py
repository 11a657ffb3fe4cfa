"""Doses |h' - h|/|h|: what the strengths of a plan can give, what rounding adds, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steer_server.errors import SteeringNotAppliedError
from steer_server.types import SteeringPlan

_ARITHMETIC = 1e-5
"""Upper bound of the relative error of norms and unit vectors computed in float32, for any hidden size."""


def dose_limit(bound: float, dtype: torch.dtype) -> float:
    """The largest dose that strengths with at most ``bound`` can give, with h' = h + |h| push rounded to ``dtype``."""
    return bound * (1.0 + _ARITHMETIC) + (1.0 + bound) * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def dose_floor(bound: float) -> float:
    """The dose that rounding alone can give where strengths cancel whose magnitudes add up to ``bound``.

    A dose must be above it to be an effect of steering.
    """
    return bound * _ARITHMETIC


def check_strengths(plan: SteeringPlan, dtype: torch.dtype) -> None:
    """Raises :class:`SteeringNotAppliedError` for a strength that hidden states in ``dtype`` cannot resolve."""
    resolution = torch.finfo(dtype).eps
    for application in plan.applications:
        # A smaller push changes only a few elements of the state, and so no longer points in its direction.
        if 0.0 < abs(application.setting.strength) < resolution:
            raise SteeringNotAppliedError(
                f"{application.name}: strength {application.setting.strength:g} is lost in rounding: hidden states in "
                f"{str(dtype).removeprefix('torch.')} resolve strengths of {resolution:.1g} and more"
            )


@dataclass
class DoseStatistics:
    """The doses at the positions that one operator pushed in one row so far; empty where its strength is zero.

    Each is that of its layer: of the sum of the operators that push there at that position.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, among the positions to be pushed: their keys and values came from the prefix cache."""
    total: float = 0.0
    highest: float = 0.0

    def add(self, doses: Sequence[float], *, prompt: bool) -> None:
        if prompt:
            self.prompt_tokens += len(doses)
        else:
            self.generated_tokens += len(doses)
        self.total += sum(doses)
        self.highest = max((self.highest, *doses))
