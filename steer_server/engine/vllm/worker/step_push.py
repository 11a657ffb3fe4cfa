"""What one layer is to add to the hidden states in a step, and what was measured when it did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from operators.core.movement import Movement
from steer_server.engine.vllm.worker.pushes import TokenSpan, concatenate_ranges, copy_to_device


@dataclass(eq=False)
class StepPush:
    """The pushes of one layer in one step. Filled by :class:`LayerRows`; ``moved`` by :mod:`.step_movements`.

    The host reads none of its tensors before the step is over: on an accelerator it would wait for it.
    """

    rows: torch.Tensor
    """(R,): rows of the batch."""
    push: torch.Tensor
    """(R, d)."""
    usable: torch.Tensor
    """(R,): which rows have a direction. The others are pushed by nothing, or by some of their operators only."""
    spans: Sequence[TokenSpan]
    """Whose the rows are, in their order; no row twice."""
    step: int
    moved: Movement | None = None
    """What the hook found where it had pushed, (R,) each; None until it ran and that was measured."""
    times: int = 0
    """How often the hook ran: once is right."""

    def release(self) -> None:
        """Frees the pushes, once the forward pass is over: what was measured may be read much later."""
        self.push = self.push.new_empty(0)


def read_movements(step_pushes: Sequence[StepPush]) -> Iterator[tuple[list[list[float]], list[float]]]:
    """Of each push, the movement of each of its rows (none if the hook did not run), and which have a direction (1.0).

    In one transfer to the host.
    """
    measured = [(one, one.moved) for one in step_pushes if one.moved is not None]
    moved: list[list[float]] = []
    usable: list[float] = []
    if measured:
        columns = [joined([getattr(moved, name) for _, moved in measured]) for name in ("dose", "due", "rounding")]
        directions = joined([one.usable for one, _ in measured])
        rows = torch.stack((*columns, directions.to(columns[0].dtype)), dim=-1).cpu().numpy()
        moved, usable = rows[:, :3].tolist(), rows[:, 3].tolist()
    start = 0
    for one in step_pushes:
        if one.moved is None:
            yield [], one.usable.tolist()
            continue
        end = start + len(one.moved.dose)
        yield moved[start:end], usable[start:end]
        start = end


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of several, or the only one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class LayerRows:
    """The rows that one layer pushes in a step, and those that follow them where each span has one token."""

    def __init__(self, spans: Sequence[TokenSpan], device: torch.device) -> None:
        """``spans`` of one request may overlap: its operators may push different positions."""
        self._spans, self._num_rows = spans, 0
        self._places: torch.Tensor | None = None
        """Where the rows of the given spans are among those of the merged ones; None where they are the same."""
        if len({span.request for span in spans}) < len(spans):
            self._spans, starts = merge_spans(spans)
            self._num_rows = sum(span.num_tokens for span in self._spans)
            places = concatenate_ranges(starts, [span.num_tokens for span in spans])
            self._places = copy_to_device(places, device)
        self._rows = copy_to_device(rows_of(self._spans), device)

    def step_push(
        self, push: torch.Tensor, usable: torch.Tensor, step: int, later: Mapping[str, TokenSpan] | None = None
    ) -> StepPush:
        """The pushes (T, d) of the layer, span after span, with those of several operators on one row added up.

        A row is usable only if all operators that push it have a direction.

        Args:
            later: by request, the single tokens that have taken the places of the first ones.
        """
        if self._places is not None:
            push = push.new_zeros(self._num_rows, push.shape[1]).index_add_(0, self._places, push)
            num_unusable = push.new_zeros(self._num_rows).index_add_(0, self._places, (~usable).to(push.dtype))
            usable = num_unusable == 0
        spans = self._spans if later is None else [later[span.request] for span in self._spans]
        return StepPush(self._rows, push, usable, spans, step)


def rows_of(spans: Sequence[TokenSpan]) -> torch.Tensor:
    """The rows of the batch that spans have, one span after the other."""
    return concatenate_ranges([span.start_row for span in spans], [span.num_tokens for span in spans])


def merge_spans(spans: Sequence[TokenSpan]) -> tuple[list[TokenSpan], list[int]]:
    """Spans that hold every row of the given ones once, and at which of all their rows each given one begins."""
    merged: list[TokenSpan] = []
    starts, total = [0] * len(spans), 0
    for index in sorted(range(len(spans)), key=lambda index: spans[index].start_row):
        span = spans[index]
        if merged and merged[-1].request == span.request and span.first_position <= merged[-1].end_position:
            more = span.end_position - merged[-1].end_position
            if more > 0:
                merged[-1] = merged[-1]._replace(num_tokens=merged[-1].num_tokens + more)
                total += more
        else:
            merged.append(span)
            total += span.num_tokens
        starts[index] = total - (merged[-1].end_position - span.first_position)
    return merged, starts
