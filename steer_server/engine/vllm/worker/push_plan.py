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

from operators.core.apply import PreparedOperator, terms
from steer_server.engine.vllm.worker.pushes import OperatorGroup, SpanPush, concatenate_ranges, copy_to_device


class PushPlan:
    """(lambda/2) d_k/|d_k| for every token of every span of every group that is pushed.

    With the operator's a_k and the anchor z of the setting, d_k = (1 - blend) a_k/|a_k| + blend z/|z|. All that does
    not depend on the embeddings is laid out once. Where every span has one token, :meth:`compute` can be called again
    for the next token of each, and so on, as long as the same operators push the same requests.
    """

    def __init__(self, groups: Sequence[OperatorGroup], like: torch.Tensor) -> None:
        """Lays out a step.

        Args:
            groups: the ``span_pushes`` of each are reordered.
            like: (..., d) float32, on the device of the embeddings.
        """
        for group in groups:
            group.span_pushes.sort(key=partial(_sort_key, group.operator.factors.shape[0]))
        span_pushes = [push for group in groups for push in group.span_pushes]
        counts = [group.num_pushed for group in groups]
        self._directions = _Directions(groups, counts, like)
        self._half_strengths = _per_token([push.half_strength for push in span_pushes], span_pushes, like)
        self._blends = self._anchors = None
        if any(0.0 < push.blend < 1.0 for push in span_pushes):
            self._blends = _per_token([push.blend for push in span_pushes], span_pushes, like)
            self._anchors = torch.cat(
                [group.unit_anchor.expand(count, -1) for group, count in zip(groups, counts, strict=True)]
            )

    def compute(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pushes of a step. Nothing is read from the device. The running sums of the groups' pushes are advanced.

        Args:
            x: (R, d) float32, the step's embeddings.

        Returns:
            The pushes (T, d) float32, group after group and span after span, in the new order; and which of the tokens
            (T,) have a direction. The push of those that have none is 0.
        """
        unit, usable = _normalise(self._directions.compute(x))
        if self._blends is not None and self._anchors is not None:
            blended, blend_usable = _normalise((1.0 - self._blends) * unit + self._blends * self._anchors)
            # Tokens without a blend keep their bits, whatever the blends of their neighbours.
            unit = torch.where(self._blends > 0, blended, unit)
            usable = usable & (blend_usable | (self._blends == 0).squeeze(-1))
        pushes = self._half_strengths * unit
        return pushes.masked_fill_(~usable[:, None], 0.0), usable


@dataclass(frozen=True, eq=False)
class _Product:
    """B_{j mod n} x_j of consecutive rows of the gathered embeddings."""

    operator: PreparedOperator
    blocks: Sequence[torch.Tensor]
    """B_i^T (d, r)."""
    block: int
    """j mod n of its tokens, where that is the same for all."""
    positions: torch.Tensor | None
    """j of each of its tokens, where it is not."""
    out: torch.Tensor
    """(T, r)."""

    def compute(self, x: torch.Tensor, steps: int) -> None:
        """``x`` (T, d); ``steps``: positions that its tokens have advanced."""
        if self.positions is None:
            torch.mm(x, self.blocks[(self.block + steps) % len(self.blocks)], out=self.out)
        else:
            self.out.copy_(terms(self.operator, x, self.positions))


@dataclass(frozen=True, eq=False)
class _Expansion:
    """U s of the tokens of one group that are pushed."""

    coefficients: torch.Tensor
    """s (T, r) of all its tokens."""
    pushed: torch.Tensor | None
    """Which of them are pushed, where these are not all."""
    basis: torch.Tensor | None
    """U^T (r, d); None for the identity."""
    out: torch.Tensor

    def compute(self) -> None:
        coefficients = self.coefficients if self.pushed is None else self.coefficients[self.pushed]
        if self.basis is None:
            self.out.copy_(coefficients)
        else:
            torch.mm(coefficients, self.basis, out=self.out)


class _Directions:
    """a_k of the tokens that are pushed; of a group without a rule the anchor."""

    def __init__(self, groups: Sequence[OperatorGroup], counts: Sequence[int], like: torch.Tensor) -> None:
        """``counts``: how many tokens of each group are pushed."""
        self._a = like.new_empty(sum(counts), like.shape[-1])
        """(T, d). The rows of anchors stay as they are set here."""
        of_groups = list(zip(groups, torch.split(self._a, list(counts)), strict=True))
        for group, a in of_groups:
            if group.rule is None:
                a.copy_(group.unit_anchor.expand_as(a))
        self._offsets = _offsets_of(of_groups)
        # Those with running sums first, so that what is added to these is one tensor.
        summed = [one for one in of_groups if one[0].rule == "cumulative"]
        computed = [*summed, *(one for one in of_groups if one[0].rule == "substitute")]
        self._span_pushes = [push for group, _ in summed for push in group.span_pushes]
        """Those with running sums."""
        every = [push for group, _ in computed for push in group.span_pushes]
        rows = concatenate_ranges([push.offset for push in every], [push.num_tokens for push in every])
        self._rows = copy_to_device(rows, like.device)
        sizes = [group.num_tokens * group.operator.factors.shape[1] for group, _ in computed]
        terms_of_all = like.new_empty(sum(sizes))
        before = [
            _padded(push.running_sum, push.num_tokens) for push in self._span_pushes if push.running_sum is not None
        ]
        self._sums = torch.cat(before) if before else like.new_empty(0)
        """Flat, token after token: the running sums (r,), once they are computed."""
        self._terms = terms_of_all[: len(self._sums)]
        """What a step adds to them."""
        of_terms = torch.split(terms_of_all, sizes)
        of_sums = torch.split(self._sums, sizes[: len(summed)])
        self._products: list[_Product] = []
        self._counts: list[int] = []
        """Rows of each product."""
        self._expansions: list[_Expansion] = []
        for index, (group, a) in enumerate(computed):
            shape = group.num_tokens, group.operator.factors.shape[1]
            self._add_products(group, of_terms[index].view(shape))
            coefficients = (of_sums[index] if index < len(summed) else of_terms[index]).view(shape)
            pushed = None
            if len(a) < group.num_tokens:
                pushed = copy_to_device(_pushed_places(group.span_pushes), like.device)
            self._expansions.append(_Expansion(coefficients, pushed, group.operator.transposed_basis, a))
        self._steps = 0

    def _add_products(self, group: OperatorGroup, out: torch.Tensor) -> None:
        """Those of one group, side by side in ``out`` (T, r): of its long spans, then of each block's single tokens."""
        operator, blocks = group.operator, group.operator.transposed_factors
        parts: list[tuple[int, torch.Tensor | None, int]] = []
        """Block, positions, number of tokens."""
        if group.rule == "substitute":
            blocks = blocks[-1:]
            parts.append((0, None, len(out)))
        else:
            long = [push for push in group.span_pushes if push.num_tokens > 1]
            counts = [push.num_tokens for push in long]
            if long:
                positions = concatenate_ranges([push.first_position for push in long], counts)
                parts.append((0, positions, sum(counts)))
            single = (push.first_position % len(blocks) for push in group.span_pushes[len(long) :])
            parts += [(block, None, len(list(same))) for block, same in groupby(single)]
        own = (out,) if len(parts) == 1 else torch.split(out, [count for *_, count in parts])
        for (block, positions_of_part, count), part in zip(parts, own, strict=True):
            self._products.append(_Product(operator, blocks, block, positions_of_part, part))
            self._counts.append(count)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """(T, d), of embeddings ``x`` (R, d). Advances the running sums. To be read before the next call."""
        if self._products:
            parts = torch.split(x[self._rows], self._counts)
            for product, part in zip(self._products, parts, strict=True):
                product.compute(part, self._steps)
            self._sums += self._terms
            if not self._steps:
                self._hand_back_sums()
            for expansion in self._expansions:
                expansion.compute()
        self._steps += 1
        if self._offsets is not None:
            self._a += self._offsets
        return self._a

    def _hand_back_sums(self) -> None:
        """Gives spans their sums after their last token. Those of single tokens are the very ones that go on."""
        sizes = [push.num_tokens * len(push.running_sum) for push in self._span_pushes if push.running_sum is not None]
        for push, sums in zip(self._span_pushes, torch.split(self._sums, sizes), strict=True):
            if push.num_tokens > 1:
                sums = sums.view(push.num_tokens, -1).cumsum_(0)[-1].clone()
            push.running_sum = sums


def _padded(before: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Flat, of each token of a span: the running sum ``before`` the first one (r,), and zeros."""
    if num_tokens == 1:
        return before
    return torch.cat((before, before.new_zeros((num_tokens - 1) * len(before))))


def _offsets_of(of_groups: Sequence[tuple[OperatorGroup, torch.Tensor]]) -> torch.Tensor | None:
    """c or b of every token that is pushed, (T, d), 0 where its operator has none; None where none has one."""
    offsets = [
        None if group.rule is None else group.operator.base if group.rule == "substitute" else group.operator.offset
        for group, _ in of_groups
    ]
    if all(offset is None for offset in offsets):
        return None
    return torch.cat(
        [
            torch.zeros_like(a) if offset is None else offset.expand_as(a)
            for offset, (_, a) in zip(offsets, of_groups, strict=True)
        ]
    )


def _pushed_places(span_pushes: Sequence[SpanPush]) -> torch.Tensor:
    """Which of the tokens of these spans, counted one span after the other, are pushed."""
    ends = list(accumulate(push.num_tokens for push in span_pushes))
    counts = [push.span.num_tokens for push in span_pushes]
    return concatenate_ranges([end - count for end, count in zip(ends, counts, strict=True)], counts)


def _sort_key(blocks: int, push: SpanPush) -> int:
    """Spans of several tokens first; then single tokens, those of one block side by side, for one product.

    A vector has no blocks, and no products.
    """
    return -1 if push.num_tokens > 1 else push.first_position % max(blocks, 1)


def _normalise(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """v/|v| (T, d), and which rows (T,) have a finite norm other than 0."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norms, ((norms > 0) & (norms < torch.inf)).squeeze(-1)


def _per_token(values: list[float], span_pushes: Sequence[SpanPush], like: torch.Tensor) -> torch.Tensor:
    """One value per span, repeated for each of its tokens that is pushed: (T, 1), on the device of ``like``."""
    repeated = torch.tensor(values, dtype=torch.float32)
    if any(push.span.num_tokens != 1 for push in span_pushes):
        repeated = repeated.repeat_interleave(torch.tensor([push.span.num_tokens for push in span_pushes]))
    return copy_to_device(repeated[:, None], like.device)
