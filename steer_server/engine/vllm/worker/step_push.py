"""What one layer is to add to the hidden states in a step, and what was measured when it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steer_server.engine.vllm.worker.pushes import TokenSpan, concatenate_ranges, copy_to_device


@dataclass(eq=False)
class StepPush:
    """The pushes of one layer in one step. Filled by :func:`combine_pushes`; ``doses`` by the layer's hook.

    The host reads none of its tensors before the step is over: on an accelerator it would wait for it.
    """

    rows: torch.Tensor
    """(R,): rows of the batch."""
    push: torch.Tensor
    """(R, d)."""
    usable: torch.Tensor
    """(R,): which rows have a direction. The others are pushed by nothing, or by some of their operators only."""
    spans: Sequence[TokenSpan]
    """Whose the rows are, in their order."""
    step: int
    doses: torch.Tensor | None = None
    """(R,): |h' - h|/|h|; None until the hook ran."""

    def release(self) -> None:
        """Frees the pushes, once the forward pass is over: what was measured may be read much later."""
        self.push = self.push.new_empty(0)

    def read(self) -> tuple[list[float], list[float]]:
        """The doses (none if the hook did not run) and which rows have a direction, in one transfer to the host."""
        if self.doses is None:
            return [], self.usable.tolist()
        doses, usable = torch.stack((self.doses, self.usable.to(self.doses))).tolist()
        return doses, usable


def combine_pushes(spans: Sequence[TokenSpan], push: torch.Tensor, usable: torch.Tensor, step: int) -> StepPush:
    """The pushes (T, d) of one layer, span after span, with those of several operators on one span added up.

    A row is usable only if all its operators have a direction.
    """
    offsets: dict[TokenSpan, int] = {}
    total = 0
    for span in spans:
        if span not in offsets:
            offsets[span] = total
            total += span.num_tokens
    distinct = list(offsets)
    rows = concatenate_ranges([span.start_row for span in distinct], [span.num_tokens for span in distinct])
    if len(distinct) < len(spans):
        places = concatenate_ranges([offsets[span] for span in spans], [span.num_tokens for span in spans])
        places = copy_to_device(places, push.device)
        push = push.new_zeros(total, push.shape[1]).index_add_(0, places, push)
        num_unusable = push.new_zeros(total).index_add_(0, places, (~usable).to(push.dtype))
        usable = num_unusable == 0
    return StepPush(copy_to_device(rows, push.device), push, usable, distinct, step)
