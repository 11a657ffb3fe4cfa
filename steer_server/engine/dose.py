"""Doses |h' - h|/|h|: what the strengths of a plan can give, what rounding adds, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from steer_server.errors import SteeringNotAppliedError
from steer_server.types import SteeringPlan

_ARITHMETIC = 1e-5
"""Upper bound of the relative error of norms and unit vectors computed in float32, for any hidden size."""


@dataclass(frozen=True)
class DoseBounds:
    """The doses that operators which push one position of a layer together can give, before rounding."""

    low: float
    """Where all others work against the strongest; 0 where they can cancel it."""
    high: float
    """Where all agree: the sum of |lambda|/2. Of one operator both are |lambda|/2."""

    @classmethod
    def of(cls, strengths: Iterable[float]) -> DoseBounds:
        """Of the operators with these strengths lambda, at least one."""
        halves = [abs(strength) / 2.0 for strength in strengths]
        high = sum(halves)
        return cls(max(0.0, 2.0 * max(halves) - high), high)

    def problem(self, dose: float, due: float, rounding: float) -> str:
        """What is wrong with the movement of one hidden state (:class:`operators.core.movement.Movement`); or nothing.

        Said in strengths, of which a dose is half.
        """
        slack = self.high * _ARITHMETIC
        # Negated, so that NaN is wrong as well. Where strengths cancel, rounding alone can move the state by the slack.
        if not (slack < dose < math.inf and slack < due):
            return (
                f"the hidden state moved as by strength {2.0 * dose:g}; a positive, finite change is needed (strengths "
                "may cancel, or be lost in rounding to the model's dtype)"
            )
        if not self.low - slack <= due <= self.high + slack:
            return f"a push of strength {2.0 * due:g} was worked out; {self._expected()}"
        if not abs(dose - due) <= due * _ARITHMETIC + rounding:
            return f"the hidden state moved as by strength {2.0 * dose:g}; {self._expected()}"
        return ""

    def _expected(self) -> str:
        if self.low == self.high:
            return f"{2.0 * self.high:g} was to be applied"
        return f"between {2.0 * self.low:g} and {2.0 * self.high:g} is what the strengths give together"


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
