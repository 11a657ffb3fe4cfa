"""The ``with`` blocks that change a model: to differentiate it, to record its frozen factors, to replay them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from operators.core.errors import UnsupportedModelError
from operators.maps.detach.experts import Mixture, mix_experts
from operators.maps.detach.families import FamilyRules, family_of
from operators.maps.detach.family import Attention, GatedMLP
from operators.maps.detach.rules import (
    FROZEN_NOW,
    AttentionOutput,
    FrozenGate,
    FrozenSlope,
    Tape,
    frozen_eager,
    frozen_sdpa,
    mix,
    wide_linear,
    with_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RULE_SET = "up-live/1"
"""Names the choice of rules, in every artifact. Another choice (gate live) reconstructs as well, and gives other
operators."""

_FROZEN_ATTENTION = {"sdpa": frozen_sdpa, "eager": frozen_eager}
for _name, _function in _FROZEN_ATTENTION.items():
    for _variant, _attention in (("detached", _function), ("recorded", with_weights(_function))):
        AttentionInterface.register(f"{_variant}_{_name}", _attention)
        AttentionMaskInterface.register(f"{_variant}_{_name}", ALL_MASK_ATTENTION_FUNCTIONS[_name])


@contextmanager
def detached(model: PreTrainedModel, *, within: nn.Module | None = None) -> Iterator[None]:
    """Inside the block, gradients of ``model`` follow the detached rules; values stay what they were.

    The gradient of a hidden state h (d,) with respect to the embeddings x_i (d,) is then J_i with sum_i J_i x_i + c = h
    (Golden, section 3), where the ordinary gradient only describes small changes of x.

    The model is restored however the block ends. Two threads must not do this to one model at a time.

    Args:
        within: the part of the model that will be called, where it is one: no other module is changed.

    Raises:
        UnsupportedModelError: a module is in no table, or the attention implementation is neither sdpa nor
            eager. The model is untouched. Inside the block: an attention module computes its weights itself.
    """
    with _frozen(model, Tape("live", {}), "detached", within):
        yield


@contextmanager
def recording(model: PreTrainedModel, *, within: nn.Module | None = None) -> Iterator[Tape]:
    """Like :func:`detached`; the tape keeps every frozen factor of the last forward pass, for :func:`replaying`.

    The forward pass must have a batch of one prompt.
    """
    tape = Tape("record", {})
    with _frozen(model, tape, "recorded", within) as family, ExitStack() as undo:
        for module in (model if within is None else within).modules():
            if type(module) in family.attentions:
                undo.callback(module.register_forward_hook(partial(_keep_weights, tape)).remove)
        yield tape


@contextmanager
def replaying(
    model: PreTrainedModel, tape: Tape, *, final: nn.Module | None = None, within: nn.Module | None = None
) -> Iterator[None]:
    """Inside the block, the model's blocks are the affine maps that were recorded, for inputs of the recorded length.

    Call the blocks themselves, with hidden states (l, n, d) and nothing else: whatever uses positions and masks is
    frozen. Queries, keys and gates are not computed. Hidden states may have a wider dtype than the weights: a bfloat16
    model's map is applied in float32.

    Args:
        final: a block of which only the last position is needed, and computed beyond the values of attention; what it
            returns for the other positions is meaningless. None means that all blocks compute all positions.
        within: the block that will be called, where it is one: no other is changed, which takes time for each module.
    """
    changed: nn.Module = model if within is None else within
    family = family_of(model)
    tape = tape.replayed()
    with ExitStack() as undo:
        _freeze_forwards_and_gates(changed, family, tape, undo)
        in_final = set() if final is None else set(final.modules())
        for module in list(changed.modules()):
            kind = type(module)
            if kind in family.attentions:
                # One position broadcasts over the stream of all of them: the sum is right at the last one only.
                queries = slice(-1, None) if module in in_final else slice(None)
                replay = partial(_replay_attention, module, family.attentions[kind], tape, queries)
                _swap(module, "forward", replay, undo)
            if isinstance(module, nn.Linear):
                _swap(module, "forward", partial(_apply_linear, module), undo)
            elif isinstance(module, Conv1D):
                _swap(module, "forward", partial(_apply_conv1d, module), undo)
            table = family.mlps.get(kind)
            if isinstance(table, GatedMLP) and table.gate is not None:
                # The activation returns the recorded factor whatever it is given.
                _swap(module, table.gate, nn.Identity(), undo)
            if table is not None and module in in_final:
                _swap(module, "forward", partial(_at_the_last_position, module.forward), undo)
        yield


@contextmanager
def _frozen(
    model: PreTrainedModel, tape: Tape, variant: Literal["detached", "recorded"], within: nn.Module | None
) -> Iterator[FamilyRules]:
    family = family_of(model)
    changed: nn.Module = model if within is None else within
    implementation = model.config._attn_implementation
    if implementation not in _FROZEN_ATTENTION:
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} cannot be detached; load the model with one of "
            f"{sorted(_FROZEN_ATTENTION)}"
        )
    with ExitStack() as undo:
        _freeze_forwards_and_gates(changed, family, tape, undo)
        frozen: list[nn.Module] = []
        undo.callback(FROZEN_NOW.reset, FROZEN_NOW.set(frozen))
        for name, module in changed.named_modules():
            if type(module) in family.attentions:
                check = partial(_check_frozen, name, frozen)
                undo.callback(module.register_forward_hook(check).remove)
        undo.callback(model.set_attn_implementation, implementation)
        model.set_attn_implementation(f"{variant}_{implementation}")
        yield family


def _freeze_forwards_and_gates(model: nn.Module, family: FamilyRules, tape: Tape, undo: ExitStack) -> None:
    for module in list(model.modules()):
        kind = type(module)
        table = family.mlps.get(kind)
        if kind in family.forwards:
            _swap(module, "forward", partial(_forward, family.forwards[kind], module, tape), undo)
        elif isinstance(table, Mixture):
            _swap(module, "forward", partial(mix_experts, module, table, tape), undo)
        elif table is not None:
            frozen = FrozenGate if isinstance(table, GatedMLP) else FrozenSlope
            _swap(module, table.activation, frozen(getattr(module, table.activation), module, tape), undo)


def _apply_linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return wide_linear(x, module.weight, module.bias)


def _apply_conv1d(module: Any, x: torch.Tensor) -> torch.Tensor:
    return wide_linear(x, module.weight.T, module.bias)


def _forward(rule: Callable[..., torch.Tensor], module: nn.Module, tape: Tape, x: torch.Tensor) -> torch.Tensor:
    return rule(module, x, tape)


def _swap(module: nn.Module, attribute: str, value: object, undo: ExitStack) -> None:
    if attribute == "forward" and attribute not in module.__dict__:
        # An instance attribute hides the method of the class; deleting it shows the method again.
        undo.callback(delattr, module, attribute)
    else:
        undo.callback(setattr, module, attribute, getattr(module, attribute))
    setattr(module, attribute, value)


def _check_frozen(name: str, frozen: list[nn.Module], module: nn.Module, _args: object, _output: object) -> None:
    """Refuses an attention module that has just computed its weights otherwise: they are on the linear path then."""
    if module not in frozen:
        raise UnsupportedModelError(
            f"module {name!r} of class {type(module).__name__} computes its attention itself, and not by the attention "
            "interface of transformers: its weights cannot be frozen"
        )
    frozen.clear()


def _keep_weights(tape: Tape, module: nn.Module, _args: object, output: AttentionOutput) -> None:
    weights = output[1] if isinstance(output, tuple) else None
    if weights is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not return the attention weights that the interface gave it; they cannot be "
            "recorded"
        )
    tape.keep(module, weights)


def _replay_attention(
    module: nn.Module,
    table: Attention,
    tape: Tape,
    queries: slice,
    hidden_states: torch.Tensor,
    *_args: Any,
    **_kwargs: Any,
) -> AttentionOutput:
    weights = tape.factor(module, lambda: hidden_states)[0, :, queries]
    output: torch.Tensor = getattr(module, table.output)(mix(weights, table.values(module, hidden_states)))
    return output, None


def _at_the_last_position(mlp: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return mlp(x[:, -1:])
