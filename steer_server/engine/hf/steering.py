"""Applying steering plans to the rows of a batch, and measuring what that did.

A :class:`RowSteering` follows one row and computes its pushes from token ids; :func:`load_pushes` and
:func:`record_doses` stand around each forward pass. A push that was not applied, or that changed nothing, is an error:
there is no path on which a plan is dropped and the text goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from operators.core.apply import Direction
from operators.core.errors import SteeringError
from operators.core.hooks import LayerPush, PushHooks
from steer_server.engine.dose import DoseStatistics, check_strengths, dose_limit
from steer_server.engine.hf.operator_cache import PreparedOperatorCache
from steer_server.engine.receipts import make_receipts
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import Application, Receipt, SteeringPlan


@dataclass(frozen=True)
class _AppliedDirection:
    """The running direction of one application whose strength is not 0."""

    layer: int
    half_strength: float
    direction: Direction


class RowSteering:
    """The state of one row's plan: a running sum per operator, the measured doses per layer."""

    def __init__(self, plan: SteeringPlan, operators: PreparedOperatorCache, dtype: torch.dtype) -> None:
        """Raises :class:`SteeringNotAppliedError` for a strength that hidden states in ``dtype`` cannot resolve."""
        self._plan = plan
        check_strengths(plan, dtype)
        self._directions = [
            _AppliedDirection(
                application.layer,
                application.setting.strength / 2.0,
                Direction(operators.get(application), application.setting),
            )
            for application in plan.applications
            if application.setting.strength != 0.0
        ]
        self._doses = {applied.layer: DoseStatistics() for applied in self._directions}
        self._limits = {layer: dose_limit(plan.dose_bound(layer), dtype) for layer in self._doses}

    @property
    def layers(self) -> frozenset[int]:
        """Layers that this row is pushed at."""
        return frozenset(self._doses)

    def pushes(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """Per layer, the push (T, d) for the next T tokens with embeddings ``x`` (T, d).

        Raises:
            SteeringNotAppliedError: a direction is zero or not finite at some position.
        """
        pushes: dict[int, torch.Tensor] = {}
        for applied in self._directions:
            try:
                push = applied.half_strength * applied.direction.advance(x)
            except SteeringError as error:
                raise SteeringNotAppliedError(f"layer {applied.layer}: {error}") from error
            pushes[applied.layer] = pushes[applied.layer] + push if applied.layer in pushes else push
        return pushes

    def record(self, layer: int, doses: Sequence[float], *, prompt: bool) -> None:
        """Adds the measured doses of one step to the statistics of a layer.

        Raises:
            SteeringNotAppliedError: a dose is zero, not finite, or above what the strengths can give.
        """
        for dose in doses:
            if not 0.0 < dose < float("inf"):
                raise SteeringNotAppliedError(
                    f"{self._describe_layer(layer)} at layer {layer}: the hidden state moved by {dose} of its norm; a "
                    "positive, finite change is needed (strengths may cancel, or be lost in rounding to the model's "
                    "dtype)"
                )
            if dose > self._limits[layer]:
                raise SteeringNotAppliedError(
                    f"{self._describe_layer(layer)} at layer {layer}: the hidden state moved by {dose:g} of its norm; "
                    f"these strengths give at most {self._plan.dose_bound(layer):g}"
                )
        self._doses[layer].add(doses, prompt=prompt)

    def receipts(self) -> tuple[Receipt, ...]:
        """One per operator of the plan, in its order."""
        return make_receipts(
            self._plan, [self._doses.get(use.layer, DoseStatistics()) for use in self._plan.applications]
        )

    def describe(self) -> str:
        """The operators and strengths, for messages."""
        return _describe(self._plan.applications)

    def _describe_layer(self, layer: int) -> str:
        return _describe([application for application in self._plan.applications if application.layer == layer])


def load_pushes(hooks: PushHooks, steered: Mapping[int, RowSteering], x: Mapping[int, torch.Tensor]) -> None:
    """Loads the pushes of the next forward pass.

    Args:
        steered: the steered rows of the batch, by index.
        x: their embeddings (T, d), by the same index.

    Raises:
        SteeringNotAppliedError: a direction is zero or not finite at some position.
    """
    rows: dict[int, list[int]] = defaultdict(list)
    pushes: dict[int, list[torch.Tensor]] = defaultdict(list)
    for row, steering in steered.items():
        for layer, push in steering.pushes(x[row]).items():
            rows[layer].append(row)
            pushes[layer].append(push)
    hooks.load(
        {
            layer: LayerPush(torch.tensor(rows[layer], device=stacked[0].device), torch.stack(stacked))
            for layer, stacked in pushes.items()
        }
    )


def record_doses(hooks: PushHooks, steered: Mapping[int, RowSteering], *, prompt: bool) -> None:
    """Hands the doses of the last forward pass to the rows they belong to.

    Raises:
        SteeringNotAppliedError: a hook did not run, or a dose is not what the strengths give.
    """
    try:
        measured = hooks.doses()
    except SteeringError as error:
        raise SteeringNotAppliedError(str(error)) from error
    for layer, doses in measured.items():
        pushed = [steering for steering in steered.values() if layer in steering.layers]
        for steering, row_doses in zip(pushed, doses.tolist(), strict=True):
            steering.record(layer, row_doses, prompt=prompt)


def _describe(applications: Sequence[Application]) -> str:
    return ", ".join(f"{application.name}={application.setting.strength:g}" for application in applications)
