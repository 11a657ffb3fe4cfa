"""What a worker knows of one steered request: where it stands, its running sums, its doses and its first failure."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from steer_server.engine.vllm.worker.pushes import TokenSpan
from steer_server.engine.vllm.worker_protocol import OperatorSetting


@dataclass(frozen=True)
class LayerDoses:
    """What was measured of one request at one layer: a dose per position, from the first uncached one on."""

    layer: int
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
    salt: str
    dose_limits: Mapping[int, tuple[float, float]]
    """By layer: every dose must be above the first number and at most the second."""
    position: int = 0
    """Position of its next token, if no step is missed."""
    end: int = 0
    """End of what was computed or cached so far; ``position`` falls behind it when the request is preempted."""
    running_sums: list[torch.Tensor | None] = field(default_factory=list)
    """Of each operator, the sum (r,) over the positions before ``position``; None where it must be computed."""
    cached: int = 0
    prefix_step: int = -1
    """Last step in which it took keys and values from the cache, at its begin or after a preemption."""
    doses: dict[int, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    """By layer, from position ``cached`` on."""
    failure: str = ""

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

    def record(self, layer: int, span: TokenSpan, doses: Sequence[float], usable: Sequence[float]) -> str:
        """Records the doses of a span; returns what is wrong with them, or nothing.

        Args:
            doses: empty if the layer's hook did not run.
            usable: which tokens had a direction.
        """
        if not all(usable):
            # Checked first: such a token is pushed by nothing, or by some of its operators, so its dose is wrong too.
            place = next(place for place, has_direction in enumerate(usable) if not has_direction)
            return f"the steering direction at position {span.first_position + place} is zero or not finite"
        if not doses:
            return f"layer {layer} was not reached: the model did not call its hook"
        recorded = self.doses[layer]
        recorded_end = self.cached + len(recorded)
        if span.first_position > recorded_end:
            return f"layer {layer}: {not_steered(recorded_end, span.first_position)}"
        # Positions that are computed again, after a preemption, are recorded already.
        recorded.extend(doses[max(0, recorded_end - span.first_position) :])
        floor, limit = self.dose_limits.get(layer, (0.0, 0.0))
        # Negated, so that NaN is wrong as well.
        wrong = next((dose for dose in doses if not floor < dose <= limit), None)
        if wrong is None:
            return ""
        return (
            f"layer {layer}: the hidden state moved by {wrong:g} of its norm; a positive change of at most "
            f"{limit:g} is what the strengths give (they may cancel, or be lost in rounding to the model's dtype)"
        )

    def measurement(self) -> RequestMeasurement:
        """What was recorded so far."""
        layers = tuple(LayerDoses(layer, tuple(doses)) for layer, doses in sorted(self.doses.items()))
        return RequestMeasurement(self.cached, layers, self.failure)


def not_steered(first: int, end: int) -> str:
    """The failure of a request of which no step announced the positions ``first`` to ``end`` - 1."""
    return f"positions {first} to {end - 1} were not steered: no step announced them"
