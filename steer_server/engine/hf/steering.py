"""Applying steering plans to the layer inputs of a transformers model, and measuring what that did.

A :class:`RowSteering` follows one row and works out its pushes from token ids; a :class:`SteeringHooks` writes the
pushes of a batch into the model. A push that was not applied, or that changed nothing, is an error: there is no
path on which a plan is dropped and the text goes on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn

from operators.core.apply import Direction, PreparedOperator, prepare, steer
from operators.core.errors import SteeringError
from steer_server.engine.dose import Dose, check_strengths, dose_limit
from steer_server.engine.receipts import receipts_of
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import Application, Receipt, SteeringPlan


@dataclass(frozen=True)
class _Source:
    layer: int
    half_strength: float
    direction: Direction


class RowSteering:
    """The state of one row's plan: a running sum per operator, a measured dose per layer."""

    def __init__(self, plan: SteeringPlan, prepared: PreparedOperators, dtype: torch.dtype) -> None:
        """Raises :class:`SteeringNotAppliedError` for a strength that hidden states in ``dtype`` cannot resolve."""
        self._plan = plan
        check_strengths(plan, dtype)
        self._sources = [
            _Source(
                use.layer,
                use.setting.strength / 2.0,
                Direction(prepared.get(use), use.setting),
            )
            for use in plan.applications
            if use.setting.strength != 0.0
        ]
        self._doses = {source.layer: Dose() for source in self._sources}
        self._limits = {layer: dose_limit(plan.dose_bound(layer), dtype) for layer in self._doses}

    @property
    def layers(self) -> frozenset[int]:
        """Layers that this row is pushed at."""
        return frozenset(self._doses)

    def pushes(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """Per layer, the push (T, d) for the next T tokens with embeddings ``x`` (T, d)."""
        pushes: dict[int, torch.Tensor] = {}
        for source in self._sources:
            try:
                push = source.half_strength * source.direction.advance(x)
            except SteeringError as error:
                raise SteeringNotAppliedError(f"layer {source.layer}: {error}") from error
            pushes[source.layer] = pushes[source.layer] + push if source.layer in pushes else push
        return pushes

    def record(self, layer: int, doses: Sequence[float], *, prompt: bool) -> None:
        """Takes note of the measured doses of one step.

        Raises:
            SteeringNotAppliedError: a dose that is empty, not finite, or above what the strengths can give.
        """
        for dose in doses:
            if not 0.0 < dose < float("inf"):
                raise SteeringNotAppliedError(
                    f"{self._names(layer)} at layer {layer}: the hidden state moved by {dose} of its norm; a positive, "
                    "finite change is needed (strengths may cancel, or be lost in rounding to the model's dtype)"
                )
            if dose > self._limits[layer]:
                raise SteeringNotAppliedError(
                    f"{self._names(layer)} at layer {layer}: the hidden state moved by {dose:g} of its norm; these "
                    f"strengths give at most {self._plan.dose_bound(layer):g}"
                )
        self._doses[layer].add(doses, prompt=prompt)

    def receipts(self) -> tuple[Receipt, ...]:
        """One per operator of the plan, in its order."""
        return receipts_of(self._plan, self._doses)

    def describe(self) -> str:
        """The operators and strengths, for messages."""
        return ", ".join(f"{use.name}={use.setting.strength:g}" for use in self._plan.applications)

    def _names(self, layer: int) -> str:
        uses = [use for use in self._plan.applications if use.layer == layer]
        return ", ".join(f"{use.name}={use.setting.strength:g}" for use in uses)


@dataclass
class _Site:
    """What one layer's hook is to do in the next forward pass, and what it did."""

    rows: list[int] = field(default_factory=list)
    pushes: list[torch.Tensor] = field(default_factory=list)
    doses: torch.Tensor | None = None


class SteeringHooks:
    """``with SteeringHooks(layers, which) as hooks:`` - the model is restored on every way out.

    Before each forward pass call :meth:`load`, after it :meth:`collect`.
    """

    def __init__(self, decoder_layers: nn.ModuleList, which: Iterable[int]) -> None:
        self._decoder_layers = decoder_layers
        self._which = sorted(set(which))
        self._sites: dict[int, _Site] = {}
        self._undo = ExitStack()

    def __enter__(self) -> SteeringHooks:
        for layer in self._which:
            handle = self._decoder_layers[layer].register_forward_pre_hook(self._hook(layer), with_kwargs=True)
            self._undo.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def load(self, steered: Sequence[tuple[int, RowSteering]], x: Mapping[int, torch.Tensor]) -> None:
        """Prepares the next forward pass: (row of the batch, its steering) for that row's embeddings (T, d)."""
        self._sites = {layer: _Site() for layer in self._which}
        for row, steering in steered:
            for layer, push in steering.pushes(x[row]).items():
                self._sites[layer].rows.append(row)
                self._sites[layer].pushes.append(push)

    def collect(self, steered: Sequence[tuple[int, RowSteering]], *, prompt: bool) -> None:
        """Books what the forward pass did. Raises :class:`SteeringNotAppliedError` where a hook did not run."""
        by_row = dict(steered)
        for layer, site in self._sites.items():
            if not site.rows:
                continue
            if site.doses is None:
                raise SteeringNotAppliedError(f"layer {layer} was not reached: the model did not call its hook")
            for row, doses in zip(site.rows, site.doses.tolist(), strict=True):
                by_row[row].record(layer, doses, prompt=prompt)
        self._sites = {}

    def _hook(self, layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            site = self._sites.get(layer)
            if site is None or not site.rows:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            rows = torch.tensor(site.rows, device=hidden.device)
            moved, site.doses = steer(hidden[rows], torch.stack(site.pushes))
            # Rows without a push keep their bits: only the steered ones are written.
            hidden = hidden.index_copy(0, rows, moved)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook


class PreparedOperators:
    """Operators on the device that steers, kept between jobs; the least recently used go when ``budget`` is passed."""

    def __init__(self, device: torch.device, *, budget: int) -> None:
        """``budget``: bytes. One job's operators may pass it while the job runs."""
        self._device = device
        self._budget = budget
        self._kept: OrderedDict[str, PreparedOperator] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, use: Application) -> PreparedOperator:
        """Raises :class:`SteeringNotAppliedError` for an operator that has no direction."""
        digest = use.artifact.digest
        if digest not in self._kept:
            try:
                self._kept[digest] = prepare(use.artifact, self._device)
            except SteeringError as error:
                raise SteeringNotAppliedError(f"{use.name}: {error}") from error
        self._kept.move_to_end(digest)
        return self._kept[digest]

    def trim(self) -> None:
        """Drops what passes the budget."""
        while self._kept and sum(kept.nbytes for kept in self._kept.values()) > self._budget:
            self._kept.popitem(last=False)
