"""The pushes of a large step: a bounded number of tokens at a time, added up in one tensor per layer.

A step of 8192 tokens that 16 operators push each has 131,072 pushes. All at once, with what their computation needs
beside them, they would take many times what the sums take that the layers add.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from steer_server.engine.vllm.memory import CHUNK_BYTES
from steer_server.engine.vllm.worker.push_plan import PushPlan
from steer_server.engine.vllm.worker.pushes import (
    OperatorGroup,
    SpanPush,
    TokenSpan,
    concatenate_ranges,
    copy_to_device,
)
from steer_server.engine.vllm.worker.step_push import StepPush, merge_spans, rows_of


def tokens_per_chunk(width: int) -> int:
    """How many float32 vectors of ``width`` numbers are worked on at once."""
    return max(1, CHUNK_BYTES // (4 * width))


def compute_in_chunks(
    groups: Sequence[tuple[int, OperatorGroup]], x: torch.Tensor, size: int, step: int
) -> dict[int, StepPush]:
    """The pushes of a step by layer, worked out for ``size`` tokens at a time.

    Args:
        groups: each with its layer; the running sums of their ``span_pushes`` are advanced.
        x: (R, d) float32, the step's embeddings.
    """
    spans: dict[int, list[TokenSpan]] = defaultdict(list)
    for layer, group in groups:
        spans[layer].extend(push.span for push in group.span_pushes if push.span.num_tokens)
    sums = {layer: _LayerSum(of_layer, x) for layer, of_layer in spans.items() if of_layer}
    for chunk in _chunks(groups, size):
        pushes, usable = PushPlan([part.group for part in chunk], x).compute(x)
        start = 0
        for part in chunk:
            end = start + part.group.num_pushed
            if end > start:
                sums[part.layer].add(part.group.span_pushes, pushes[start:end], usable[start:end])
            for piece, whole in part.pieces:
                whole.running_sum = piece.running_sum
            start = end
    return {layer: total.step_push(step) for layer, total in sums.items()}


@dataclass(eq=False)
class _Part:
    """What one chunk has of a group."""

    layer: int
    of: OperatorGroup
    group: OperatorGroup
    pieces: list[tuple[SpanPush, SpanPush]] = field(default_factory=list)
    """Each with the span that it is a piece of."""


def _chunks(groups: Sequence[tuple[int, OperatorGroup]], size: int) -> Iterator[list[_Part]]:
    """Pieces of all spans, ``size`` tokens at a time. A piece begins with the running sum that the one before it left.

    So the next chunk is made when the one before it has been worked out, and holds no two pieces of one span.
    """
    chunk: list[_Part] = []
    room = size
    for layer, group in groups:
        for push in group.span_pushes:
            start = 0
            while start < push.num_tokens:
                end = min(push.num_tokens, start + room)
                if not chunk or chunk[-1].of is not group:
                    chunk.append(_Part(layer, group, replace(group, span_pushes=[])))
                piece = _piece(push, start, end)
                chunk[-1].group.span_pushes.append(piece)
                chunk[-1].pieces.append((piece, push))
                room -= end - start
                start = end
                if not room:
                    yield chunk
                    chunk, room = [], size
    if chunk:
        yield chunk


def _piece(push: SpanPush, start: int, end: int) -> SpanPush:
    """The tokens ``start`` to ``end`` - 1 of a span, summed ones first."""
    num_summed = max(0, min(end, push.num_summed) - start)
    first = push.first_position + start + num_summed
    span = push.span._replace(
        start_row=push.span.start_row + first - push.span.first_position,
        first_position=first,
        num_tokens=end - start - num_summed,
    )
    return replace(push, span=span, num_summed=num_summed, offset=push.offset + start)


class _LayerSum:
    """The sum of the pushes of one layer."""

    def __init__(self, spans: Sequence[TokenSpan], like: torch.Tensor) -> None:
        self._spans, _ = merge_spans(spans)
        self._places: Mapping[str, list[tuple[TokenSpan, int]]] = defaultdict(list)
        """By request, its spans and where in the sum each begins."""
        total = 0
        for span in self._spans:
            self._places[span.request].append((span, total))
            total += span.num_tokens
        self._push = like.new_zeros(total, like.shape[1])
        self._unusable = like.new_zeros(total)

    def add(self, pieces: Sequence[SpanPush], push: torch.Tensor, usable: torch.Tensor) -> None:
        """Adds the pushes (T, d) of some spans, one after the other."""
        spans = [piece.span for piece in pieces if piece.span.num_tokens]
        places = concatenate_ranges([self._place(span) for span in spans], [span.num_tokens for span in spans])
        places = copy_to_device(places, push.device)
        self._push.index_add_(0, places, push)
        self._unusable.index_add_(0, places, (~usable).to(push.dtype))

    def step_push(self, step: int) -> StepPush:
        """The whole."""
        rows = copy_to_device(rows_of(self._spans), self._push.device)
        return StepPush(rows, self._push, self._unusable == 0, self._spans, step)

    def _place(self, span: TokenSpan) -> int:
        return next(
            place + span.first_position - whole.first_position
            for whole, place in self._places[span.request]
            if whole.first_position <= span.first_position < whole.end_position
        )
