"""Steering the rows of a continuous batch: many requests, each at its own position, in one forward pass.

What a serving engine gives is told here in its plainest form: which request owns which tokens of the step
(:class:`Segment`), and the embeddings of those tokens. Nothing here knows the engine.

Tokens that meet the same operator are worked out together, whatever requests they belong to, so that the cost follows
the number of operators in a step and not that of strengths, blends or requests. A request's state is its running sum,
kept with the position that it stands at: a request that comes back at another position (preempted and resumed, begun
after a cached prefix) has its sum made again from its token ids.

What lies before a token must have been steered in the steps that were seen here, or be said by the engine to come from
its cache (:meth:`BatchSteering.arrives`). A gap that nobody announced is a failure, never taken for a cached prefix.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from operators.core.apply import PreparedOperator, terms
from operators.core.header import Rule
from steer_server.engine.dose import dose_floor, dose_limit
from steer_server.engine.vllm.pushes import Group, Segment, Task, indices, send, work_out
from steer_server.types import SteeringPlan

Earlier = Callable[[str, int], torch.Tensor]
"""``earlier(request, k)``: the embeddings (k, d) of a request's first k tokens."""


@dataclass(frozen=True)
class Use:
    """One operator of one request, as it travels to a worker: ids and scalars. The strength is not 0."""

    digest: str
    rule: Rule
    strength: float
    blend: float


def uses_of(plan: SteeringPlan) -> tuple[Use, ...]:
    """What of a plan travels to the workers: every operator of a strength other than 0."""
    return tuple(
        Use(use.artifact.digest, use.setting.rule, use.setting.strength, use.setting.blend)
        for use in plan.applications
        if use.setting.strength != 0.0
    )


@dataclass(frozen=True, eq=False)
class Sited:
    """A loaded operator and the layer whose input it pushes."""

    operator: PreparedOperator
    layer: int


@dataclass(frozen=True)
class Measured:
    """What was done to one request at one layer: a dose per position from ``cached`` on."""

    layer: int
    doses: tuple[float, ...]


@dataclass(frozen=True)
class Account:
    """What was done to one request. ``failure`` says why its text must not be shown; empty if nothing is wrong.

    ``cached``: positions at its beginning whose keys and values were computed, and steered alike, by an earlier
    request.
    """

    cached: int
    layers: tuple[Measured, ...]
    failure: str


@dataclass(eq=False)
class Site:
    """What one layer is to do in a step, and what it did: rows of the batch, their pushes (R, d), their doses (R,).

    ``usable`` (R,): which rows have a direction. Nothing of it is looked at before it is booked: on an accelerator the
    host would wait for the step.
    """

    rows: torch.Tensor
    push: torch.Tensor
    usable: torch.Tensor
    owners: Sequence[Segment]
    step: int
    doses: torch.Tensor | None = None

    def let_go(self) -> None:
        """Drops the pushes, after the forward pass: only what was measured waits to be booked."""
        self.push = self.push.new_empty(0)


@dataclass(eq=False)
class _Followed:
    uses: tuple[Use, ...]
    salt: str
    limits: Mapping[int, tuple[float, float]]
    """By layer, what a dose must pass and what it cannot pass."""
    position: int = 0
    """Where its next token must be, if no step was missed."""
    reached: int = 0
    """The end of what it steered or found so far, wherever it stands."""
    sums: list[torch.Tensor | None] = field(default_factory=list)
    cached: int = 0
    found: int = -1
    """The last step in which it began, or came back, after positions that it did not compute there."""
    doses: dict[int, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    failure: str = ""


class BatchSteering:
    """The plans of the requests of a batch. Call :meth:`prepare` before a forward pass and :meth:`book` after it."""

    def __init__(self, dtype: torch.dtype) -> None:
        """``dtype``: of the hidden states."""
        self._dtype = dtype
        self._operators: dict[str, Sited] = {}
        self._followed: dict[str, _Followed] = {}
        self._step = 0
        self._tainted: dict[str, int] = {}
        """By salt, the first step in which a request failed: what is found from then on may be what it left.

        Kept for good: no one knows when the last request of a salt has come. It grows by failures, which are rare.
        """

    def load(self, digest: str, sited: Sited) -> None:
        """Makes an operator known by its digest; whatever has that digest is the same operator."""
        self._operators[digest] = sited

    def unload(self, digest: str) -> None:
        """Forgets an operator. A request that still uses it fails."""
        self._operators.pop(digest, None)

    @property
    def loaded(self) -> Mapping[str, Sited]:
        """Operators by digest."""
        return self._operators

    def follow(self, request: str, uses: tuple[Use, ...], salt: str) -> None:
        """A new request; one that is followed already goes on.

        ``salt``: of its keys and values. What a request that failed left under one is not to be found by another.
        """
        if request in self._followed:
            return
        bounds: dict[int, float] = defaultdict(float)
        unknown = [use.digest for use in uses if use.digest not in self._operators]
        for use in uses:
            if not unknown:
                bounds[self._operators[use.digest].layer] += abs(use.strength) / 2.0
        limits = {layer: (dose_floor(bound), dose_limit(bound, self._dtype)) for layer, bound in bounds.items()}
        new = self._followed[request] = _Followed(uses, salt, limits, sums=[None] * len(uses))
        if unknown:
            self._fail(new, self._step, f"operator {unknown[0]} is not loaded")

    def __contains__(self, request: str) -> bool:
        return request in self._followed

    def __len__(self) -> int:
        return len(self._followed)

    def account(self, request: str) -> Account:
        """What was done to a request so far. Raises :class:`KeyError` for one that is not followed."""
        found = self._followed[request]
        if found.salt in self._tainted and found.found >= self._tainted[found.salt]:
            self._fail(found, found.found, "its prompt's beginning was left by a request that failed")
        layers = tuple(Measured(layer, tuple(doses)) for layer, doses in sorted(found.doses.items()))
        return Account(found.cached, layers, found.failure)

    def forget(self, request: str) -> None:
        """Drops the state of a request."""
        self._followed.pop(request, None)

    def arrives(self, request: str, at: int) -> None:
        """A request begins, or comes back, in the coming step: at ``at``, the cache of keys and values has all before.

        One that is not followed is none of ours.
        """
        arriving = self._followed.get(request)
        if arriving is None:
            return
        if at != arriving.position:
            arriving.position, arriving.sums = at, [None] * len(arriving.uses)
        if at:
            arriving.found = self._step + 1
        if at > arriving.reached:
            # It begins after a prefix; or was preempted in its prompt, and found more of it than it had computed.
            arriving.cached = arriving.reached = at
            arriving.doses.clear()

    def missed(self, request: str) -> None:
        """Tokens of a request were computed in a step that was not prepared for it. As :meth:`arrives` otherwise."""
        if request in self._followed:
            self._fail(self._followed[request], self._step, "a step ran without its pushes")

    def prepare(self, segments: Sequence[Segment], x: torch.Tensor, earlier: Earlier) -> dict[int, Site]:
        """The pushes of a step, by layer.

        Args:
            segments: the tokens of followed requests in this step.
            x: (sum of counts, d), their embeddings as the first block receives them, segment after segment.

        A request with an operator that is gone, without a direction at some token, or with a token that no step
        brought has its failure noted; whoever asks for its account learns of it.
        """
        self._step += 1
        x = x.to(torch.float32)
        groups: dict[tuple[int, str, Rule | None], Group] = {}
        at = 0
        for segment in segments:
            request = self._followed[segment.request]
            self._arrive(request, segment, earlier)
            for index, use in enumerate(request.uses):
                sited = self._operators.get(use.digest)
                if sited is None:
                    self._fail(request, self._step, f"operator {use.digest} was unloaded")
                    continue
                # At blend 1 every rule is the anchor.
                rule = None if use.blend == 1.0 else use.rule
                group = groups.setdefault((sited.layer, use.digest, rule), Group(sited.operator, rule, []))
                group.tasks.append(Task(segment, index, at, use.strength / 2.0, use.blend, request.sums[index]))
            request.position = segment.first + segment.count
            request.reached = max(request.reached, request.position)
            at += segment.count
        return self._sites(groups, x) if groups else {}

    def _sites(self, groups: Mapping[tuple[int, str, Rule | None], Group], x: torch.Tensor) -> dict[int, Site]:
        # By layers, so that the pushes of each lie side by side.
        ordered = sorted(groups.items(), key=lambda item: item[0][0])
        push, usable = work_out([group for _, group in ordered], x)
        tasks: dict[int, list[Task]] = defaultdict(list)
        for (layer, _, _), group in ordered:
            tasks[layer].extend(group.tasks)
            for task in group.tasks:
                self._followed[task.segment.request].sums[task.use] = task.total
        sites, at = {}, 0
        for layer, some in tasks.items():
            end = at + sum(task.count for task in some)
            sites[layer] = _site([task.segment for task in some], push[at:end], usable[at:end], self._step)
            at = end
        return sites

    def book(self, sites: Mapping[int, Site]) -> None:
        """Takes note of what a forward pass did."""
        for layer, site in sites.items():
            doses, usable = _read(site)
            at = 0
            for segment in site.owners:
                request, mine = self._followed.get(segment.request), slice(at, at + segment.count)
                at += segment.count
                if request is not None and (problem := _note(request, layer, segment, doses[mine], usable[mine])):
                    self._fail(request, site.step, problem)

    def _arrive(self, request: _Followed, segment: Segment, earlier: Earlier) -> None:
        if segment.first > request.position:
            self._fail(request, self._step, _missed(request.position, segment.first))
        begun = segment.first == request.position
        stale = [
            index
            for index, use in enumerate(request.uses)
            if _sums_up(use) and use.digest in self._operators and not (begun and request.sums[index] is not None)
        ]
        before = earlier(segment.request, segment.first).to(torch.float32) if stale and segment.first else None
        for index in stale:
            operator = self._operators[request.uses[index].digest].operator
            request.sums[index] = (
                operator.factors.new_zeros(operator.factors.shape[1])
                if before is None
                else terms(operator, before, torch.arange(segment.first)).sum(0)
            )

    def _fail(self, request: _Followed, step: int, problem: str) -> None:
        request.failure = request.failure or problem
        self._tainted[request.salt] = min(step, self._tainted.get(request.salt, step))


def _sums_up(use: Use) -> bool:
    return use.rule == "cumulative" and use.blend != 1.0


def _site(segments: Sequence[Segment], push: torch.Tensor, usable: torch.Tensor, step: int) -> Site:
    """The pushes (T, d) of one layer, segment after segment; those of one token add up, and all must be usable."""
    slots: dict[Segment, int] = {}
    total = 0
    for segment in segments:
        if segment not in slots:
            slots[segment] = total
            total += segment.count
    owners = list(slots)
    rows = indices([segment.start for segment in owners], [segment.count for segment in owners])
    if len(owners) < len(segments):
        places = indices([slots[segment] for segment in segments], [segment.count for segment in segments])
        places = send(places, push.device)
        push = push.new_zeros(total, push.shape[1]).index_add_(0, places, push)
        missing = push.new_zeros(total).index_add_(0, places, (~usable).to(push.dtype))
        usable = missing == 0
    return Site(send(rows, push.device), push, usable, owners, step)


def _read(site: Site) -> tuple[list[float], list[float]]:
    """Its doses (none if the hook did not run) and which rows have a direction, in one go."""
    if site.doses is None:
        return [], site.usable.tolist()
    doses, usable = torch.stack((site.doses, site.usable.to(site.doses))).tolist()
    return doses, usable


def _note(request: _Followed, layer: int, segment: Segment, doses: Sequence[float], usable: Sequence[float]) -> str:
    """Books the doses of a segment; what is wrong with them, or nothing."""
    if not all(usable):
        # Such a row is pushed by nothing, or by a part of what it should be: its dose tells less.
        missing = next(place for place, good in enumerate(usable) if not good)
        return f"the steering direction at position {segment.first + missing} is zero or not finite"
    if not doses:
        return f"layer {layer} was not reached: the model did not call its hook"
    floor, limit = request.limits.get(layer, (0.0, 0.0))
    booked = request.doses[layer]
    # Positions that are computed once more, after a preemption, were counted before.
    known = request.cached + len(booked)
    if segment.first > known:
        return f"layer {layer}: {_missed(known, segment.first)}"
    booked.extend(doses[max(0, known - segment.first) :])
    wrong = next((dose for dose in doses if not floor < dose <= limit), None)
    if wrong is None:
        return ""
    return (
        f"layer {layer}: the hidden state moved by {wrong:g} of its norm; a positive change of at most "
        f"{limit:g} is what the strengths give (they may cancel, or be lost in rounding to the model's dtype)"
    )


def _missed(first: int, end: int) -> str:
    return f"positions {first} to {end - 1} were not steered: no step announced them"
