"""The pushes of one step, for the tokens of many requests at once.

Operations that are the same for every token run once, over the tokens of all operators. Per operator there remain two
matrix products (the first of them one per block in use), so that 64 different operators in a step cost little more
than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby

import torch

from operators.core.apply import PreparedOperator, cumulative, substitute, terms
from operators.core.header import Anchor, Rule


@dataclass(frozen=True)
class TokenSpan:
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
    offset: int
    """Row of its first token in the step's embeddings; summed ones come before those that are pushed."""
    half_strength: float
    """lambda/2."""
    blend: float
    running_sum: torch.Tensor | None
    """(r,): s_{k-1} of the rule "cumulative", before its first token; :func:`compute_pushes` replaces it by that after
    its last one. None where there is none."""

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


def compute_pushes(groups: Sequence[OperatorGroup], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(lambda/2) d_k/|d_k| for every token of every span of every group that is pushed.

    With the operator's a_k and the anchor z of the setting, d_k = (1 - blend) a_k/|a_k| + blend z/|z|. Nothing is read
    from the device.

    Args:
        groups: the ``span_pushes`` of each are reordered, and their running sums advanced.
        x: (R, d) float32, the step's embeddings.

    Returns:
        The pushes (T, d) float32, group after group and span after span, in the new order; and which of the tokens (T,)
        have a direction. The push of those that have none is 0.
    """
    for group in groups:
        group.span_pushes.sort(key=partial(_sort_key, group.operator.factors.shape[0]))
    span_pushes = [push for group in groups for push in group.span_pushes]
    rows = concatenate_ranges([push.offset for push in span_pushes], [push.num_tokens for push in span_pushes])
    gathered = x[copy_to_device(rows, x.device)]
    unnormalised, start = [], 0
    for group in groups:
        end = start + group.num_tokens
        unnormalised.append(_unnormalised_directions(group, gathered[start:end]))
        start = end
    unit, usable = _normalise(unnormalised[0] if len(unnormalised) == 1 else torch.cat(unnormalised))
    if any(0.0 < push.blend < 1.0 for push in span_pushes):
        blend = _per_token([push.blend for push in span_pushes], span_pushes, x)
        anchors = torch.cat([group.unit_anchor.expand(group.num_pushed, -1) for group in groups])
        blended, blend_usable = _normalise((1.0 - blend) * unit + blend * anchors)
        # Tokens without a blend keep their bits, whatever the blends of their neighbours.
        unit = torch.where(blend > 0, blended, unit)
        usable = usable & (blend_usable | (blend == 0).squeeze(-1))
    pushes = _per_token([push.half_strength for push in span_pushes], span_pushes, x) * unit
    return torch.where(usable[:, None], pushes, torch.zeros_like(pushes)), usable


def _unnormalised_directions(group: OperatorGroup, x: torch.Tensor) -> torch.Tensor:
    """a_k (T, d) of the tokens that are pushed, from the embeddings ``x`` of all."""
    if group.rule is None:
        return group.unit_anchor.expand(x.shape[0], -1)
    if group.rule == "substitute":
        return substitute(group.operator, x)
    sums = _running_sums(group.operator, group.span_pushes, x)
    if group.num_pushed < group.num_tokens:
        sums = sums[copy_to_device(_pushed_places(group.span_pushes), sums.device)]
    return cumulative(group.operator, sums)


def _pushed_places(span_pushes: Sequence[SpanPush]) -> torch.Tensor:
    """Which of the tokens of these spans, counted one span after the other, are pushed."""
    ends = list(accumulate(push.num_tokens for push in span_pushes))
    counts = [push.span.num_tokens for push in span_pushes]
    return concatenate_ranges([end - count for end, count in zip(ends, counts, strict=True)], counts)


def _running_sums(operator: PreparedOperator, span_pushes: Sequence[SpanPush], x: torch.Tensor) -> torch.Tensor:
    """s_k (T, r) at every token, summed or pushed; the running sum of each span advances to its last token.

    ``span_pushes`` are in the order of :func:`_sort_key`: spans of several tokens, then single tokens block by block.
    """
    blocks, rank, _ = operator.factors.shape
    sums = x.new_empty(x.shape[0], rank)
    before = torch.stack([push.running_sum for push in span_pushes if push.running_sum is not None])
    long = [push for push in span_pushes if push.num_tokens > 1]
    num_long_tokens = sum(push.num_tokens for push in long)
    if long:
        counts = [push.num_tokens for push in long]
        positions = concatenate_ranges([push.first_position for push in long], counts)
        sums[:num_long_tokens] = terms(operator, x[:num_long_tokens], positions)
        for push, part, earlier in zip(long, torch.split(sums[:num_long_tokens], counts), before, strict=False):
            part[0] += earlier
            push.running_sum = part.cumsum_(0)[-1].clone()
    single = span_pushes[len(long) :]
    end = num_long_tokens
    for block, of_block in groupby(single, key=lambda push: push.first_position % blocks):
        start, end = end, end + len(list(of_block))
        torch.mm(x[start:end], operator.factors[block].T, out=sums[start:end])
    sums[num_long_tokens:] += before[len(long) :]
    for push, running_sum in zip(single, sums[num_long_tokens:].unbind(), strict=True):
        push.running_sum = running_sum
    return sums


def _sort_key(blocks: int, push: SpanPush) -> int:
    """Spans of several tokens first; then single tokens, those of one block side by side, for one product.

    A vector has no blocks, and no products.
    """
    return -1 if push.num_tokens > 1 else push.first_position % max(blocks, 1)


def _normalise(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """v/|v| (T, d), and which rows (T,) have a finite norm other than 0."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norms, (torch.isfinite(norms) & (norms > 0)).squeeze(-1)


def _per_token(values: list[float], span_pushes: Sequence[SpanPush], like: torch.Tensor) -> torch.Tensor:
    """One value per span, repeated for each of its tokens that is pushed: (T, 1), on the device of ``like``."""
    repeated = torch.tensor(values, dtype=torch.float32)
    if any(push.span.num_tokens != 1 for push in span_pushes):
        repeated = repeated.repeat_interleave(torch.tensor([push.span.num_tokens for push in span_pushes]))
    return copy_to_device(repeated[:, None], like.device)


def copy_to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a device, made in the order of its queue: the host does not wait for it."""
    return values.to(device, non_blocking=True)


def concatenate_ranges(starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """start, start + 1, ..., ``count`` numbers for each start: (sum of counts,)."""
    if all(count == 1 for count in counts):
        return torch.tensor(starts, dtype=torch.int64)
    return torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
