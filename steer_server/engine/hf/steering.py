"""Applying steering plans to the rows of a batch, and measuring what that did.

A :class:`RowSteering` follows one row and computes its pushes from token ids; :func:`load_pushes` and
:func:`record_doses` stand around each forward pass. A push that was not applied, or that changed nothing, is an error:
there is no path on which a plan is dropped and the text goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from operators.core.errors import SteeringError
from operators.core.hooks import PushHooks, layer_push
from operators.core.pushes import SequencePushes, advance_pushes
from steer_server.engine.dose import DoseBounds, DoseStatistics, check_strengths
from steer_server.engine.hf.operator_cache import PreparedOperatorCache
from steer_server.engine.proof import Proof
from steer_server.engine.receipts import make_receipts
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import Application, Receipt, SteeringPlan


@dataclass(frozen=True, eq=False)
class _AppliedOperator:
    """One application whose strength is not 0: its pushes along the row, and the doses where it pushes."""

    application: Application
    pushes: SequencePushes
    doses: DoseStatistics


class RowSteering:
    """The state of one row's plan: its operators' pushes, and the measured doses of each."""

    def __init__(
        self,
        plan: SteeringPlan,
        operators: PreparedOperatorCache,
        dtype: torch.dtype,
        *,
        prompt_tokens: int,
        traces_doses: bool = False,
    ) -> None:
        """Raises :class:`SteeringNotAppliedError` for a strength that hidden states in ``dtype`` cannot resolve.

        ``traces_doses``: keep those of :attr:`generated_doses`.
        """
        self.plan = plan
        check_strengths(plan, dtype)
        self._doses = [DoseStatistics() for _ in plan.applications]
        self._applied = [
            _AppliedOperator(
                use, SequencePushes(operators.get(use), use.setting, prompt_tokens=prompt_tokens), self._doses[place]
            )
            for place, use in enumerate(plan.applications)
            if use.setting.strength != 0.0
        ]
        self._pushed: dict[int, list[tuple[_AppliedOperator, slice]]] = {}
        """By layer: who pushes in the pass under way, and which of its tokens."""
        self._traced_layer = plan.first_layer if traces_doses else None
        self.generated_doses: list[float] = []
        """At the lowest layer that is pushed, of every token behind the prompt; 0 where nothing pushes."""

    @property
    def layers(self) -> frozenset[int]:
        """Layers that this row is pushed at, at some position."""
        return frozenset(applied.application.layer for applied in self._applied)

    @property
    def pushed_layers(self) -> frozenset[int]:
        """Layers that this row is pushed at in the pass under way."""
        return frozenset(self._pushed)

    @property
    def over(self) -> bool:
        """Whether no token from here on is pushed."""
        return all(applied.pushes.over for applied in self._applied)

    def begin(self) -> list[_AppliedOperator]:
        """Begins a pass. Returns those that push in it, or count its tokens."""
        self._pushed = {}
        return [applied for applied in self._applied if not applied.pushes.over]

    def note(self, applied: _AppliedOperator, at: slice) -> None:
        """Notes which of the tokens of the pass one of them pushes."""
        self._pushed.setdefault(applied.application.layer, []).append((applied, at))

    def record(self, layer: int, moved: Sequence[Sequence[float]], *, prompt: bool) -> None:
        """Adds what one pass over T tokens did at a layer to the statistics of those who pushed there.

        Args:
            moved: of each token, the dose, the dose that was due and the rounding of
                :class:`operators.core.movement.Movement`.

        Raises:
            SteeringNotAppliedError: at a token that was pushed, the dose is not what the strengths of those who pushed
                there give, within rounding.
        """
        pushed = self._pushed[layer]
        for low, high in _equal_stretches(at for _, at in pushed):
            uses = [applied.application for applied, at in pushed if at.start <= low < at.stop]
            if uses:
                self._check(layer, moved[low:high], uses)
        for applied, at in pushed:
            applied.doses.add([dose for dose, _, _ in moved[at]], prompt=prompt)
        if layer == self._traced_layer and not prompt:
            self.generated_doses.extend(dose for dose, _, _ in moved)

    def trace_rest(self, tokens: int) -> None:
        """Ends a pass over so many tokens behind the prompt: at the traced layer perhaps none was pushed."""
        if self._traced_layer is not None and self._traced_layer not in self._pushed:
            self.generated_doses.extend([0.0] * tokens)

    def _check(self, layer: int, moved: Sequence[Sequence[float]], uses: Sequence[Application]) -> None:
        bounds = DoseBounds.of(use.setting.strength for use in uses)
        for token in moved:
            if problem := bounds.problem(*token):
                raise SteeringNotAppliedError(f"{_describe(uses)} at layer {layer}: {problem}")

    def receipts(self, proof: Proof) -> tuple[Receipt, ...]:
        """One per operator of the plan, in its order."""
        return make_receipts(self.plan, self._doses, proof)

    def describe(self) -> str:
        """The operators and strengths, for messages."""
        return _describe(self.plan.applications)


def load_pushes(hooks: PushHooks, steered: Mapping[int, RowSteering], x: Mapping[int, torch.Tensor]) -> None:
    """Loads the pushes of the next forward pass. Rows of one operator and form are worked out together.

    Args:
        steered: the steered rows of the batch, by index.
        x: the embeddings (T, d) of those that are not over, by the same index.

    Raises:
        SteeringNotAppliedError: a direction is zero or not finite at a position that is pushed.
    """
    groups: dict[Hashable, list[tuple[int, _AppliedOperator]]] = defaultdict(list)
    for row, steering in steered.items():
        for applied in steering.begin():
            groups[applied.application.layer, applied.pushes.group].append((row, applied))
    by_layer: dict[int, dict[int, list[tuple[slice, torch.Tensor]]]] = defaultdict(lambda: defaultdict(list))
    for group in groups.values():
        layer = group[0][1].application.layer
        try:
            at, pushes = advance_pushes(
                [applied.pushes for _, applied in group], torch.stack([x[row] for row, _ in group])
            )
        except SteeringError as error:
            raise SteeringNotAppliedError(f"layer {layer}: {error}") from error
        if pushes.shape[1]:
            for (row, applied), push in zip(group, pushes, strict=True):
                steered[row].note(applied, at)
                by_layer[layer][row].append((at, push))
    tokens = max((len(embeddings) for embeddings in x.values()), default=0)
    hooks.load({layer: layer_push(pieces, tokens) for layer, pieces in by_layer.items()})


def record_doses(hooks: PushHooks, steered: Mapping[int, RowSteering], tokens: int, *, prompt: bool) -> None:
    """Hands the doses of the last forward pass, over so many tokens, to the rows they belong to.

    Raises:
        SteeringNotAppliedError: a hook did not run, or a dose is not what the strengths give.
    """
    try:
        measured = hooks.take_movements()
    except SteeringError as error:
        raise SteeringNotAppliedError(str(error)) from error
    for layer, moved in measured.items():
        pushed = [steering for steering in steered.values() if layer in steering.pushed_layers]
        rows = torch.stack((moved.dose, moved.due, moved.rounding), dim=-1).tolist()
        for steering, row in zip(pushed, rows, strict=True):
            steering.record(layer, row, prompt=prompt)
    for steering in steered.values() if not prompt else ():
        steering.trace_rest(tokens)


def _equal_stretches(slices: Iterable[slice]) -> list[tuple[int, int]]:
    """[low, high) of the stretches inside of which no slice begins or ends."""
    borders = sorted({border for each in slices for border in (each.start, each.stop)})
    return list(pairwise(borders))


def _describe(applications: Sequence[Application]) -> str:
    return ", ".join(f"{application.name}={application.setting.strength:g}" for application in applications)
