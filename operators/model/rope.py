"""Rotary factors that depend on the length of a sequence: one set for the whole of a sequence, or a refusal.

longrope has short factors for sequences up to a length and long ones beyond it; dynamic NTK has other factors for
every length beyond one. transformers chooses them anew in each forward pass, by its last position. A KV cache that was
filled before a change holds keys of other factors than the queries that read it: the model was not trained on that, and
does not compute it without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from operators.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RopeChange:
    """Sequences of more than ``length`` tokens have other factors than shorter ones.

    ``again``: and these change with every further token.
    """

    rope_type: str
    length: int
    again: bool


def rope_changes(config: Any) -> tuple[RopeChange, ...]:
    """Where the factors of a model with this text configuration change; empty for those that never do."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    # Models with several kinds of attention have a set of parameters for each.
    sets = [parameters] if "rope_type" in parameters else [each for each in parameters.values() if each]
    found = []
    for each in sets:
        kind = str(each.get("rope_type")) if isinstance(each, Mapping) else ""
        if kind == "longrope":
            original = each.get("original_max_position_embeddings") or config.original_max_position_embeddings
            found.append(RopeChange(kind, int(original), again=False))
        elif "dynamic" in kind:
            found.append(RopeChange(kind, int(config.max_position_embeddings), again=True))
    return tuple(found)


def rope_change_within(config: Any, first: int, last: int) -> RopeChange | None:
    """The change that a sequence meets that is computed at ``first`` tokens and grows, with a cache, to ``last``."""
    for change in rope_changes(config):
        if last > change.length and (first <= change.length or change.again):
            return change
    return None


def check_one_rope(config: Any, first: int, last: int) -> None:
    """Raises :class:`ModelError` where a sequence that grows from ``first`` to ``last`` tokens meets a change."""
    change = rope_change_within(config, first, last)
    if change is not None:
        raise ModelError(
            f"texts that grow from {first} to {last} tokens: the model's rotary factors ({change.rope_type}) change "
            f"beyond {change.length} tokens; shorter prompts or fewer tokens are accepted"
        )


class RopeOfLength:
    """Holds the factors of a model at those of a sequence's length, whatever part of it a forward pass computes."""

    def __init__(self, model: PreTrainedModel) -> None:
        changes = rope_changes(model.config.get_text_config())
        self._rotaries = [module for module in model.modules() if changes and _depends_on_length(module)]

    @contextmanager
    def fixed(self, length: int) -> Iterator[None]:
        """Inside the block, forward passes have the factors of a sequence of ``length`` tokens."""
        with ExitStack() as undo:
            for rotary in self._rotaries:
                undo.callback(delattr, rotary, "forward")
                rotary.forward = partial(_as_within, rotary.forward, length)
            yield


def _depends_on_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    each = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any(kind == "longrope" or "dynamic" in str(kind) for kind in each)


def _as_within(
    forward: Any, length: int, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (b, n, e) of the positions (b, n), computed together with the last one of the sequence."""
    last = position_ids.new_full((position_ids.shape[0], 1), length - 1)
    cos, sin = forward(x, torch.cat([position_ids, last], -1), *args, **kwargs)
    return cos[:, :-1], sin[:, :-1]
