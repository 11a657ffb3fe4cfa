"""Steering the rows of a continuous batch: many requests, each at its own position, in one forward pass.

What a serving engine gives is told here in its plainest form: which request owns which tokens of the step
(:class:`Segment`), and the embeddings of those tokens. Nothing here knows the engine.

Tokens that meet the same operator are worked out together, whatever requests they belong to, so that the cost follows
the number of operators in a step and not that of strengths, blends or requests. A request's state is its running sum,
kept with the position that it stands at: a request that comes back at another position (preempted and resumed, begun
after a cached prefix) has its sum made again from its token ids.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from operators.apply import PreparedOperator, cumulative, substitute, terms
from operators.header import Rule
from steer_server.engine.dose import dose_floor, dose_limit
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
class Segment:
    """``count`` tokens of one request in a step: rows ``start``... of the batch, positions ``first``... of its text."""

    request: str
    start: int
    first: int
    count: int


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
    """What one layer is to do in a step, and what it did: rows of the batch, their pushes (R, d), their doses (R,)."""

    rows: torch.Tensor
    push: torch.Tensor
    owners: Sequence[Segment]
    step: int
    doses: torch.Tensor | None = None


@dataclass(eq=False)
class _Followed:
    uses: tuple[Use, ...]
    salt: str
    limits: Mapping[int, tuple[float, float]]
    """By layer, what a dose must pass and what it cannot pass."""
    position: int = 0
    sums: list[torch.Tensor | None] = field(default_factory=list)
    cached: int | None = None
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
        """By salt, the first step in which a request failed: what is found from then on may be what it left."""

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
        return Account(found.cached or 0, layers, found.failure)

    def forget(self, request: str) -> None:
        """Drops the state of a request."""
        self._followed.pop(request, None)

    def prepare(self, segments: Sequence[Segment], x: torch.Tensor, earlier: Earlier) -> dict[int, Site]:
        """The pushes of a step, by layer.

        Args:
            segments: the tokens of followed requests in this step.
            x: (sum of counts, d), their embeddings as the first block receives them, segment after segment.

        A request with an operator that is gone, or without a direction at some token, has its failure noted and is
        not pushed; whoever asks for its account learns of it.
        """
        self._step += 1
        x = x.to(torch.float32)
        ends = list(accumulate(segment.count for segment in segments))
        spans = {segment.request: (end - segment.count, end) for segment, end in zip(segments, ends, strict=True)}
        groups: dict[tuple[str, Rule | None], list[tuple[Segment, int]]] = defaultdict(list)
        for segment in segments:
            request = self._followed[segment.request]
            self._arrive(request, segment, earlier)
            for index, use in enumerate(request.uses):
                if use.digest in self._operators:
                    # At blend 1 every rule is the anchor.
                    groups[use.digest, None if use.blend == 1.0 else use.rule].append((segment, index))
                else:
                    self._fail(request, self._step, f"operator {use.digest} was unloaded")
        pushes: dict[int, list[tuple[list[Segment], torch.Tensor]]] = defaultdict(list)
        for (digest, rule), members in groups.items():
            sited = self._operators[digest]
            push = self._group_push(sited.operator, rule, members, x, spans)
            pushes[sited.layer].append(([segment for segment, _ in members], push))
        for segment in segments:
            self._followed[segment.request].position = segment.first + segment.count
        return {layer: _merged(parts, self._step) for layer, parts in pushes.items()}

    def book(self, sites: Mapping[int, Site]) -> None:
        """Takes note of what a forward pass did."""
        for layer, site in sites.items():
            measured = None if site.doses is None else site.doses.tolist()
            at = 0
            for segment in site.owners:
                request = self._followed.get(segment.request)
                mine = None if measured is None else measured[at : at + segment.count]
                at += segment.count
                if request is not None and (problem := _note(request, layer, segment, mine)):
                    self._fail(request, site.step, problem)

    def _arrive(self, request: _Followed, segment: Segment, earlier: Earlier) -> None:
        begun = segment.first == request.position
        if request.cached is None:
            # A first step beyond the first token: what comes before was found in the cache of keys and values.
            request.cached = segment.first
        if segment.first and not begun:
            request.found = self._step
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

    def _group_push(
        self,
        operator: PreparedOperator,
        rule: Rule | None,
        members: Sequence[tuple[Segment, int]],
        x: torch.Tensor,
        spans: Mapping[str, tuple[int, int]],
    ) -> torch.Tensor:
        """(lambda/2) d_k/|d_k| (T, d) of all tokens that meet one operator by one rule."""
        counts = torch.tensor([segment.count for segment, _ in members])
        uses = [self._followed[segment.request].uses[index] for segment, index in members]
        half = _per_token([use.strength / 2.0 for use in uses], counts, x)
        if rule is None:
            return half * operator.unit_anchor
        names = [segment.request for segment, _ in members]
        mine = x if names == list(spans) else torch.cat([x[slice(*spans[name])] for name in names])
        a = substitute(operator, mine) if rule == "substitute" else self._advance(operator, members, counts, mine)
        unit, usable = _unit(a)
        if any(use.blend for use in uses):
            blend = _per_token([use.blend for use in uses], counts, x)
            # The bits of a row without a blend do not depend on its neighbours' blends.
            mixed, still = _unit((1.0 - blend) * unit + blend * operator.unit_anchor)
            unit, usable = torch.where(blend > 0, mixed, unit), usable & (still | (blend == 0).squeeze(-1))
        if not bool(usable.all()):
            self._fail_members(members, usable)
            unit = torch.where(usable[:, None], unit, torch.zeros_like(unit))
        return half * unit

    def _advance(
        self,
        operator: PreparedOperator,
        members: Sequence[tuple[Segment, int]],
        counts: torch.Tensor,
        x: torch.Tensor,
    ) -> torch.Tensor:
        """a_k of the published rule, (T, d); the requests' sums go on to the end of their segments."""
        positions = torch.cat([torch.arange(s.first, s.first + s.count) for s, _ in members])
        sums = terms(operator, x, positions)
        ends = counts.cumsum(0)
        for (segment, _), end in zip(members, ends.tolist(), strict=True):
            if segment.count > 1:
                sums[end - segment.count : end] = sums[end - segment.count : end].cumsum(0)
        begun = torch.stack([self._sum(segment, index) for segment, index in members])
        sums += begun.repeat_interleave(counts.to(x.device), 0)
        for (segment, index), last in zip(members, sums[(ends - 1).to(x.device)].unbind(), strict=True):
            self._followed[segment.request].sums[index] = last
        return cumulative(operator, sums)

    def _sum(self, segment: Segment, index: int) -> torch.Tensor:
        total = self._followed[segment.request].sums[index]
        assert total is not None  # noqa: S101 - made when the request arrived at this step
        return total

    def _fail_members(self, members: Sequence[tuple[Segment, int]], usable: torch.Tensor) -> None:
        good, at = usable.tolist(), 0
        for segment, _ in members:
            if not all(mine := good[at : at + segment.count]):
                position = segment.first + mine.index(False)
                problem = f"the steering direction at position {position} is zero or not finite"
                self._fail(self._followed[segment.request], self._step, problem)
            at += segment.count

    def _fail(self, request: _Followed, step: int, problem: str) -> None:
        request.failure = request.failure or problem
        self._tainted[request.salt] = min(step, self._tainted.get(request.salt, step))


def _sums_up(use: Use) -> bool:
    return use.rule == "cumulative" and use.blend != 1.0


def _per_token(values: list[float], counts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).repeat_interleave(counts)[:, None].to(like.device)


def _unit(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """v/|v| (T, d), and which rows (T,) have a direction."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norms, (torch.isfinite(norms) & (norms > 0)).squeeze(-1)


def _merged(parts: Sequence[tuple[list[Segment], torch.Tensor]], step: int) -> Site:
    """One site from the pushes of one or more operators; those of one token add up."""
    owners = list(dict.fromkeys(segment for segments, _ in parts for segment in segments))
    slots, total = {}, 0
    for segment in owners:
        slots[segment] = total
        total += segment.count
    rows = _ranges([segment.start for segment in owners], owners)
    push = parts[0][1]
    if len(parts) > 1 or parts[0][0] != owners:
        push = push.new_zeros(total, push.shape[1])
        for segments, part in parts:
            push.index_add_(0, _ranges([slots[segment] for segment in segments], segments).to(push.device), part)
    return Site(rows.to(push.device), push, owners, step)


def _ranges(starts: Sequence[int], segments: Sequence[Segment]) -> torch.Tensor:
    if all(segment.count == 1 for segment in segments):
        return torch.tensor(starts)
    return torch.cat(
        [torch.arange(start, start + segment.count) for start, segment in zip(starts, segments, strict=True)]
    )


def _note(request: _Followed, layer: int, segment: Segment, doses: Sequence[float] | None) -> str:
    """Books the doses of a segment; what is wrong with them, or nothing."""
    if doses is None:
        return f"layer {layer} was not reached: the model did not call its hook"
    if segment.first > (request.cached or 0) + max(map(len, request.doses.values()), default=0):
        # Preempted in its prompt, and come back to more of it than it had computed: all of that was found.
        request.cached = segment.first
        request.doses.clear()
    floor, limit = request.limits.get(layer, (0.0, 0.0))
    booked = request.doses[layer]
    # Positions that are computed once more, after a preemption, were counted before.
    known = (request.cached or 0) + len(booked)
    booked.extend(doses[max(0, known - segment.first) :])
    wrong = next((dose for dose in doses if not floor < dose <= limit), None)
    if wrong is None:
        return ""
    return (
        f"layer {layer}: the hidden state moved by {wrong:g} of its norm; a positive change of at most "
        f"{limit:g} is what the strengths give (they may cancel, or be lost in rounding to the model's dtype)"
    )
