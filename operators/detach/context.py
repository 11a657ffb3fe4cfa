"""``with detached(model):`` - the one place that changes a model to differentiate it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from operators.detach.families import family_of
from operators.detach.rules import FrozenActivation, frozen_eager, frozen_sdpa
from operators.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RULE_SET = "up-live/1"
"""Name of the choice in ``rules``; other choices (gate live) reconstruct as well and are other operators."""

_FROZEN_ATTENTION = {"sdpa": frozen_sdpa, "eager": frozen_eager}
for _name, _function in _FROZEN_ATTENTION.items():
    AttentionInterface.register(f"detached_{_name}", _function)
    AttentionMaskInterface.register(f"detached_{_name}", ALL_MASK_ATTENTION_FUNCTIONS[_name])


@contextmanager
def detached(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, gradients of ``model`` follow the detached rules; values stay what they were.

    The model is restored on every way out. Not for use by two threads at once.

    Raises:
        UnsupportedModelError: a module is in no table, or the attention implementation is neither sdpa nor
            eager. The model is untouched.
    """
    family = family_of(model)
    attention = model.config._attn_implementation
    if attention not in _FROZEN_ATTENTION:
        raise UnsupportedModelError(
            f"attention implementation {attention!r} cannot be detached; load the model with one of "
            f"{sorted(_FROZEN_ATTENTION)}"
        )
    with ExitStack() as undo:
        for module in list(model.modules()):
            kind = type(module)
            if kind in family.norms:
                module.forward = MethodType(family.norms[kind], module)
                undo.callback(delattr, module, "forward")
            elif kind in family.gated_mlps:
                attribute = family.gated_mlps[kind]
                activation = getattr(module, attribute)
                setattr(module, attribute, FrozenActivation(activation))
                undo.callback(setattr, module, attribute, activation)
        undo.callback(model.set_attn_implementation, attention)
        model.set_attn_implementation(f"detached_{attention}")
        yield
