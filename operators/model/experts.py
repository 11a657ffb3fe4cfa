"""How the experts of a mixture are computed: all by one grouped product, or one after the other (eager).

torch's grouped product takes no float64, no numbers that do not begin at multiples of 16 bytes, and has no derivative
in forward mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALIGNED = 16
"""Bytes."""


def fit_experts(model: PreTrainedModel) -> None:
    """Has the experts of a model computed one after the other where the grouped product does not take their weights."""
    if not model._can_set_experts_implementation():
        return
    # (experts, out, in)
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 3]
    sizes = {size * weight.dtype.itemsize % _ALIGNED for weight in weights for size in weight.shape[1:]}
    if sizes - {0} or any(weight.dtype == torch.float64 for weight in weights):
        model.set_experts_implementation("eager")


@contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, experts are computed one after the other."""
    if not model._can_set_experts_implementation():
        yield
        return
    before = model.config._experts_implementation
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
