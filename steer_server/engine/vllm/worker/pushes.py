"""The tokens of a step and what is to be done to them: by request, by operator of a request, and by operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from operators.core.apply import PreparedOperator
from operators.core.header import Anchor, Rule


class TokenSpan(NamedTuple):
    """The tokens of one request in a step: consecutive rows of the batch, consecutive positions of its text."""

    request: str
    start_row: int
    first_position: int
    num_tokens: int

    @property
    def end_position(self) -> int:
        """Position after its last token."""
        return self.first_position + self.num_tokens

    def part(self, start: int, end: int | None) -> TokenSpan:
        """Its tokens at the positions ``start`` to ``end`` - 1, which may be none; ``end`` None: to its own end."""
        if start <= self.first_position and (end is None or end >= self.end_position):
            return self
        last = self.end_position if end is None else max(self.first_position, min(end, self.end_position))
        first = min(max(start, self.first_position), last)
        return TokenSpan(self.request, self.start_row + first - self.first_position, first, last - first)


class GroupKey(NamedTuple):
    """What tokens have in common that are worked out together."""

    layer: int
    digest: str
    rule: Rule | None
    """None is the anchor alone (blend 1)."""
    anchor: Anchor

    @property
    def has_running_sum(self) -> bool:
        """Whether a token's push depends on those before it."""
        return self.rule == "cumulative"


@dataclass(eq=False)
class SpanPush:
    """The push of one operator on one span. Filled by :class:`.step_steering.StepSteering`.

    It is worked out from the span's tokens, and from those right before it that only count into the running sum.
    """

    span: TokenSpan
    """The tokens that are pushed: none in a step before the first position of the operator."""
    num_summed: int
    """Tokens before the span, in the same step, that only count into the running sum."""
    setting_index: int
    """Which of the request's operators."""
    group: GroupKey
    half_strength: float
    """lambda/2."""
    blend: float
    offset: int = 0
    """Row of its first token in the step's embeddings; summed ones come before those that are pushed."""
    running_sum: torch.Tensor | None = None
    """(r,): s_{k-1} of the rule "cumulative", before its first token; :class:`.push_plan.PushPlan` replaces it by that
    after its last one. None where there is none."""

    @property
    def first_position(self) -> int:
        """Position of its first token, summed or pushed."""
        return self.span.first_position - self.num_summed

    @property
    def num_tokens(self) -> int:
        """Its number of tokens, summed and pushed."""
        return self.num_summed + self.span.num_tokens


@dataclass(frozen=True, eq=False)
class OperatorGroup:
    """The spans of a step that one operator pushes by one rule. Rule None is the anchor alone (blend 1)."""

    operator: PreparedOperator
    rule: Rule | None
    anchor: Anchor
    span_pushes: list[SpanPush]

    @property
    def unit_anchor(self) -> torch.Tensor:
        """z/|z| (d,)."""
        return self.operator.unit_of(self.anchor)

    @property
    def num_tokens(self) -> int:
        """Tokens of all its spans, summed and pushed."""
        return sum(push.num_tokens for push in self.span_pushes)

    @property
    def num_pushed(self) -> int:
        """Tokens of all its spans that are pushed."""
        return sum(push.span.num_tokens for push in self.span_pushes)


def copy_to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a device, made in the order of its queue: the host does not wait for it."""
    return values.to(device, non_blocking=True)


def concatenate_ranges(starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """start, start + 1, ..., ``count`` numbers for each start: (sum of counts,)."""
    if all(count == 1 for count in counts):
        return torch.tensor(starts, dtype=torch.int64)
    return torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
