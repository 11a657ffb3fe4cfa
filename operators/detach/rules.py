"""What is frozen and what stays live.

    RMSNorm      live x                      frozen rsqrt(mean x^2 + eps)
    attention    live V, output projection   frozen softmax weights (Q and K after RoPE are detached)
    gated MLP    live up                     frozen act(gate), whole

Each rule leaves the value as it was. Norms are computed in at least float32 and never down-cast from float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

NormForward = Callable[[nn.Module, torch.Tensor], torch.Tensor]
AttentionOutput = tuple[torch.Tensor, torch.Tensor | None]
"""The output, and the weights where they were computed."""


def rms_norm(*, eps: str) -> NormForward:
    """``weight * (x * scale)``, rounded to the model's dtype before the weight; ``eps`` names the attribute."""

    def forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        scale, wide = _frozen_scale(x, getattr(module, eps))
        return _weight(module) * (wide * scale).to(x.dtype)

    return forward


def offset_rms_norm(*, eps: str) -> NormForward:
    """Gemma's ``(1 + weight) * (x * scale)``, rounded to the model's dtype last."""

    def forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        scale, wide = _frozen_scale(x, getattr(module, eps))
        return (wide * scale * (1.0 + _weight(module).to(wide.dtype))).to(x.dtype)

    return forward


class FrozenActivation(nn.Module):
    """``act(gate)`` with its gradient stopped: the gate multiplies the linear path and is not on it."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        """The activation of ``gate``, detached."""
        frozen: torch.Tensor = self.activation(gate).detach()
        return frozen


def frozen_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: object,
    **kwargs: object,
) -> AttentionOutput:
    """Scaled dot product attention whose weights are constants."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own: Callable[..., AttentionOutput] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return own(module, query.detach(), key.detach(), value, *args, **kwargs)


def frozen_eager(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: object,
    **kwargs: object,
) -> AttentionOutput:
    """The model's own eager attention (soft-caps and all) whose weights are constants."""
    own: Callable[..., AttentionOutput] = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query.detach(), key.detach(), value, *args, **kwargs)


def _frozen_scale(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps).detach(), wide


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)  # noqa: S101 - for the type checker; every norm in a table has one
    return weight
