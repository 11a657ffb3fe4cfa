"""What is frozen and what stays live.

    RMSNorm      live x                      frozen rsqrt(mean x^2 + eps)
    LayerNorm    live x - mean(x)            frozen 1/std; its bias is an affine term
    attention    live V, output projection   frozen softmax weights (Q and K after RoPE are detached)
    gated MLP    live up                     frozen act(gate), whole
    plain MLP    live x                      frozen act(x)/x

Each rule leaves the value as it was. Norms are computed in at least float32 and never down-cast from float64.
Every frozen factor goes through a :class:`Tape`, so that one rule serves three uses: differentiating the model as it
runs, recording the factors of one prompt, and replaying them on other inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

AttentionOutput = tuple[torch.Tensor, torch.Tensor | None]
"""The output, and the weights where they were computed."""


class Tape:
    """The frozen factors of one prompt, by module.

    ``live`` computes and forgets them, ``record`` keeps them, ``replay`` gives them back without computing.
    """

    def __init__(self, mode: Literal["live", "record", "replay"], factors: dict[nn.Module, torch.Tensor]) -> None:
        self._mode = mode
        self._factors = factors

    def factor(
        self, module: nn.Module, compute: Callable[[], torch.Tensor], *, of: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The detached factor of ``module``; replayed, for the last positions, as many as ``of`` (..., n, d) has."""
        if self._mode == "replay":
            factor = self._factors[module]
            return factor if of is None else factor[..., -of.shape[-2] :, :]
        value = compute().detach()
        if self._mode == "record":
            self._factors[module] = value
        return value

    def keep(self, module: nn.Module, factor: torch.Tensor) -> None:
        """Stores a factor that was computed elsewhere (attention weights)."""
        self._factors[module] = factor.detach()

    def replayed(self) -> Tape:
        """The same factors, to be replayed."""
        return Tape("replay", self._factors)


NormForward = Callable[[nn.Module, torch.Tensor, Tape], torch.Tensor]


def rms_norm(*, eps: str) -> NormForward:
    """``weight * (x * scale)``, rounded to the model's dtype before the weight; ``eps`` names the attribute."""

    def forward(module: nn.Module, x: torch.Tensor, tape: Tape) -> torch.Tensor:
        return _weight(module) * _scaled(module, _wide(x), eps, tape).to(x.dtype)

    return forward


def late_rms_norm(*, eps: str) -> NormForward:
    """``weight * (x * scale)``, rounded to the model's dtype after the weight (OLMo 2)."""

    def forward(module: nn.Module, x: torch.Tensor, tape: Tape) -> torch.Tensor:
        return (_weight(module) * _scaled(module, _wide(x), eps, tape)).to(x.dtype)

    return forward


def offset_rms_norm(*, eps: str) -> NormForward:
    """Gemma's ``(1 + weight) * (x * scale)``, rounded to the model's dtype last."""

    def forward(module: nn.Module, x: torch.Tensor, tape: Tape) -> torch.Tensor:
        wide = _wide(x)
        return (_scaled(module, wide, eps, tape) * (1.0 + _weight(module).to(wide.dtype))).to(x.dtype)

    return forward


def layer_norm(*, eps: str) -> NormForward:
    """``weight * ((x - mean x) * scale) + bias``, with a bias or without, rounded to the model's dtype last.

    The mean is linear and stays live.
    """

    def forward(module: nn.Module, x: torch.Tensor, tape: Tape) -> torch.Tensor:
        wide = _wide(x)
        centred = wide - wide.mean(-1, keepdim=True)
        normed = _scaled(module, centred, eps, tape) * _weight(module).to(wide.dtype)
        bias = getattr(module, "bias", None)
        return (normed if bias is None else normed + bias.to(wide.dtype)).to(x.dtype)

    return forward


class FrozenGate(nn.Module):
    """``act(gate)`` with its gradient stopped: the gate multiplies the linear path and is not on it."""

    def __init__(self, activation: nn.Module, owner: nn.Module, tape: Tape) -> None:
        super().__init__()
        self.activation = activation
        self._key, self._tape = (owner,), tape

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        """The activation of ``gate``, detached."""
        return self._tape.factor(self._key[0], lambda: self.activation(gate), of=gate)


class FrozenSlope(nn.Module):
    """``x * (act(x)/x)`` with the ratio frozen: for GELU, x times its gate Phi(x)."""

    def __init__(self, activation: nn.Module, owner: nn.Module, tape: Tape) -> None:
        super().__init__()
        self.activation = activation
        self._key, self._tape = (owner,), tape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The activation of ``x``, linear in it."""
        return x * self._tape.factor(self._key[0], lambda: self._ratio(x), of=x)

    def _ratio(self, x: torch.Tensor) -> torch.Tensor:
        # Where x is 0 the value is 0 whatever the ratio; the limit is taken there.
        tiny = torch.finfo(x.dtype).tiny ** 0.5
        safe = torch.where(x.abs() < tiny, torch.full_like(x, tiny), x)
        ratio: torch.Tensor = self.activation(safe) / safe
        return ratio


class Skipped(nn.Module):
    """Stands in for a projection whose result is frozen, where computing it again would be wasted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input, which nobody looks at."""
        return x


def frozen_sdpa(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
) -> AttentionOutput:
    """Scaled dot product attention whose weights are constants."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own: Callable[..., AttentionOutput] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return own(module, query.detach(), key.detach(), value, *args, **kwargs)


def frozen_eager(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
) -> AttentionOutput:
    """The model's own eager attention (soft-caps and all) whose weights are constants."""
    own: Callable[..., AttentionOutput] = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query.detach(), key.detach(), value, *args, **kwargs)


def weights_too(attention: Callable[..., AttentionOutput]) -> Callable[..., AttentionOutput]:
    """The same attention, showing its weights (b, H, n, n): what it makes of the identity in the place of V.

    Any implementation can be asked this way, in its own precision, with its own masks and soft-caps.
    """

    def forward(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
    ) -> AttentionOutput:
        n = value.shape[-2]
        identity = torch.eye(n, dtype=value.dtype, device=value.device).expand(*value.shape[:2], n, n)
        output, _ = attention(module, query, key, value, *args, **kwargs)
        weights, _ = attention(module, query, key, identity, *args, **kwargs)
        return output, weights.transpose(1, 2)

    return forward


class _WideLinear(torch.autograd.Function):
    """x W^T for x wider than W. Weights are widened for the moment of the product, forwards and backwards: a graph
    that kept them so would be a second, larger copy of the model."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return x @ weight.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.weight.to(gradient.dtype), None


def wide_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias, with ``weight`` (out, in), in the precision of ``x``."""
    if weight.dtype == x.dtype:
        # In two dimensions: of many inputs with one position each, torch would make as many small products.
        return F.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    product: torch.Tensor = _WideLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias.to(x.dtype)


def mix(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention with given weights (H, m, n) on values (l, n, K, e) of K heads: (l, m, H e), one GEMM per head.

    Query head h reads value head h // (H/K). The l inputs stand side by side, so that the weights are read once.
    """
    inputs, n, heads, size = values.shape
    group = weights.shape[0] // heads
    stacked = values.permute(2, 1, 0, 3).reshape(heads, n, inputs * size)
    asked = weights.shape[1]
    mixed = torch.bmm(weights.to(values.dtype).reshape(heads, group * asked, n), stacked)
    return mixed.view(heads, group, asked, inputs, size).permute(3, 2, 0, 1, 4).reshape(inputs, asked, -1)


def _scaled(module: nn.Module, wide: torch.Tensor, eps: str, tape: Tape) -> torch.Tensor:
    def scale() -> torch.Tensor:
        return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + float(getattr(module, eps)))

    return wide * tape.factor(module, scale, of=wide)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)  # noqa: S101 - for the type checker; every norm in a table has one
    return weight
