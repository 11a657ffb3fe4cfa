"""Doses: what the strengths of a plan allow, what rounding adds to it, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steer_server.errors import SteeringNotAppliedError
from steer_server.types import SteeringPlan

_ARITHMETIC = 1e-5
"""Relative error of norms and unit vectors of any hidden size, worked out in float32."""


def dose_limit(bound: float, dtype: torch.dtype) -> float:
    """What |h' - h|/|h| may be where the strengths give at most ``bound``, h' = h + |h| push rounded to ``dtype``."""
    return bound * (1.0 + _ARITHMETIC) + (1.0 + bound) * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def dose_floor(bound: float) -> float:
    """What |h' - h|/|h| must pass to be more than the rounding of strengths that cancel and add up to ``bound``."""
    return bound * _ARITHMETIC


def check_strengths(plan: SteeringPlan, dtype: torch.dtype) -> None:
    """Raises :class:`SteeringNotAppliedError` for a strength that hidden states in ``dtype`` cannot resolve."""
    resolution = torch.finfo(dtype).eps
    for use in plan.applications:
        # A smaller push moves a few of the state's elements and leaves the rest: no longer in its direction.
        if 0.0 < abs(use.setting.strength) < resolution:
            raise SteeringNotAppliedError(
                f"{use.name}: strength {use.setting.strength:g} is lost in rounding: hidden states in "
                f"{str(dtype).removeprefix('torch.')} resolve strengths of {resolution:.1g} and more"
            )


@dataclass
class Dose:
    """Running measurement at one layer of one row. Strengths that cancel or are zero leave it empty."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    total: float = 0.0
    highest: float = 0.0

    def add(self, doses: Sequence[float], *, prompt: bool) -> None:
        if prompt:
            self.prompt_tokens += len(doses)
        else:
            self.generated_tokens += len(doses)
        self.total += sum(doses)
        self.highest = max((self.highest, *doses))
