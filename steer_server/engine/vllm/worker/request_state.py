"""What a worker knows of one steered request: where it stands, its running sums, its doses and its first failure."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import torch

from steer_server.engine.vllm.worker.dose_ranges import DoseRange, check_movements, first_due
from steer_server.engine.vllm.worker.prepared_setting import PreparedSetting
from steer_server.engine.vllm.worker.pushes import TokenSpan
from steer_server.engine.vllm.worker_protocol import OperatorSetting


@dataclass(frozen=True)
class LayerDoses:
    """What was measured of one request at one layer: a dose per position, 0 where no operator pushes."""

    layer: int
    first: int
    """Position of the first dose."""
    doses: tuple[float, ...]


@dataclass(frozen=True)
class RequestMeasurement:
    """What was done to one request. Filled by :meth:`RequestState.measurement`."""

    cached: int
    """Positions at the beginning whose keys and values an earlier request of the same steering computed."""
    layers: tuple[LayerDoses, ...]
    failure: str
    """Why the text must not be shown; empty if nothing is wrong."""


@dataclass(eq=False)
class RequestState:
    """One request. Positions are those of its text, prompt included; steps are numbered by the caller."""

    settings: tuple[OperatorSetting, ...]
    prepared: tuple[PreparedSetting, ...]
    """Those of them that can push."""
    salt: str
    dose_ranges: Mapping[int, Sequence[DoseRange]]
    """By layer, the positions that are pushed and the doses that are accepted there."""
    position: int = 0
    """Position of its next token, if no step is missed."""
    end: int = 0
    """End of what was computed or cached so far; ``position`` falls behind it when the request is preempted."""
    running_sums: list[torch.Tensor | None] = field(default_factory=list)
    """Of each operator, the sum (r,) over the positions before ``position``, or before its last one where that has been
    passed; None where it must be computed, if it is needed at all."""
    cached: int = 0
    prefix_step: int = -1
    """Last step in which it took keys and values from the cache, at its begin or after a preemption."""
    doses: dict[int, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    """By layer, a dose per position from :meth:`_first_recorded` on; 0 where no operator pushes."""
    failure: str = ""

    @property
    def steps_unchanged(self) -> float:
        """For how many tokens from its next one on each operator has the same to do as for the one before."""
        change = min((one.change_after(self.position - 1) for one in self.prepared), default=inf)
        return change - self.position

    def start_at(self, position: int, step: int) -> None:
        """It begins, or comes back, in ``step`` at ``position``, with all earlier keys and values from the cache."""
        if position != self.position:
            self.position, self.running_sums = position, [None] * len(self.settings)
        if position:
            self.prefix_step = step
        if position > self.end:
            # It begins after a cached prefix; or it was preempted in its prompt, and more of it is cached now than it
            # had computed. Its own doses are those of keys and values that it no longer uses.
            self.cached = self.end = position
            self.doses.clear()

    def advance(self, span: TokenSpan) -> None:
        """Its tokens of a step will be computed."""
        self.position = span.first_position + span.num_tokens
        self.end = max(self.end, self.position)

    def record(self, layer: int, span: TokenSpan, moved: Sequence[Sequence[float]], usable: Sequence[float]) -> str:
        """Records what was done to a span; returns what is wrong with it, or nothing.

        Args:
            moved: of each token its movement (:class:`.DoseBounds`); empty if the layer's hook did not run.
            usable: which tokens had a direction; none of them stands for all.
        """
        if not all(usable):
            # Checked first: such a token is pushed by nothing, or by some of its operators, so its dose is wrong too.
            place = next(place for place, has_direction in enumerate(usable) if not has_direction)
            return f"the steering direction at position {span.first_position + place} is zero or not finite"
        if not moved:
            return f"layer {layer} was not reached: the model did not call its hook"
        recorded, ranges = self.doses[layer], self.dose_ranges.get(layer, ())
        recorded_end = self._first_recorded(layer) + len(recorded)
        if span.first_position > recorded_end:
            missing = first_due(ranges, recorded_end, span.first_position)
            if missing is not None:
                return f"layer {layer}: {not_steered(*missing)}"
            recorded.extend([0.0] * (span.first_position - recorded_end))
            recorded_end = span.first_position
        # Positions that are computed again, after a preemption, are recorded already.
        recorded.extend([one[0] for one in moved[recorded_end - span.first_position :]])
        problem = check_movements(ranges, span.first_position, moved)
        return f"layer {layer}: {problem}" if problem else ""

    def measurement(self) -> RequestMeasurement:
        """What was recorded so far."""
        layers = tuple(
            LayerDoses(layer, self._first_recorded(layer), tuple(doses))
            for layer, doses in sorted(self.doses.items())
            if doses
        )
        return RequestMeasurement(self.cached, layers, self.failure)

    def _first_recorded(self, layer: int) -> int:
        """The first position at which there can be a dose."""
        ranges = self.dose_ranges.get(layer)
        return ranges[0].start if ranges and ranges[0].start > self.cached else self.cached


def not_steered(first: int, end: int) -> str:
    """The failure of a request of which no step announced the positions ``first`` to ``end`` - 1."""
    return f"positions {first} to {end - 1} were not steered: no step announced them"
