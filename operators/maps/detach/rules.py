"""The rules: which factor of each module is frozen, and what stays live.

    RMSNorm      live x                      frozen rsqrt(mean x^2 + eps)
    LayerNorm    live x - mean(x)            frozen 1/std; its bias is an affine term
    attention    live V, output projection   frozen softmax weights (Q and K after RoPE are detached)
    gated MLP    live up                     frozen act(gate), whole
    plain MLP    live x                      frozen act(x)/x
    experts      live up                     frozen act(gate), the choice of experts and their weights (``experts``)

Frozen means that the factor is computed as the model does and then held constant. Each rule leaves the module's value
as it was; only the gradient changes. The choices are those of Golden, section 3. Freezing up and keeping the gate live
would give the hidden state back just as well, and be another map: RULE_SET in ``context`` names the choice.

Norms are computed in at least float32, and in float64 for float64 models. Every frozen factor goes through a
:class:`Tape`, so that one rule serves three uses: differentiating the model as it runs, recording the factors of one
prompt, and replaying them on other inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from operators.core.errors import UnsupportedModelError

AttentionOutput = tuple[torch.Tensor, torch.Tensor | None]
"""The output (b, n, H, e), and the weights (b, H, n, n) where they were computed."""


class Tape:
    """The frozen factors of one prompt, by module.

    Modes: ``live`` computes a factor and does not keep it, ``record`` computes and keeps it, ``replay`` returns what
    was kept and computes nothing.
    """

    def __init__(self, mode: Literal["live", "record", "replay"], factors: dict[nn.Module, torch.Tensor]) -> None:
        self._mode = mode
        self._factors = factors

    def factor(
        self, module: nn.Module, compute: Callable[[], torch.Tensor], *, multiplies: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The frozen factor of ``module``, without a gradient.

        Args:
            compute: gives the factor, where it is not replayed.
            multiplies: the input (..., m, d) that it will multiply. Where that has only the last m of the n recorded
                positions, so has the replayed factor. None means all positions.
        """
        if self._mode == "replay":
            factor = self._factors[module]
            return factor if multiplies is None else factor[..., -multiplies.shape[-2] :, :]
        value = compute().detach()
        if self._mode == "record":
            self._factors[module] = value
        return value

    def keep(self, module: nn.Module, factor: torch.Tensor) -> None:
        """Records a factor that was computed elsewhere (attention weights)."""
        self._factors[module] = factor.detach()

    def replayed(self) -> Tape:
        """A tape with the same factors that replays them."""
        return Tape("replay", self._factors)


ForwardRule = Callable[[nn.Module, torch.Tensor, Tape], torch.Tensor]
"""A module's forward with its factor on the tape: (module, x, tape) -> output, both (..., n, d)."""


def rms_norm(*, eps: str) -> ForwardRule:
    """``weight * (x * scale)``, rounded to the model's dtype before the weight; ``eps`` names the attribute."""

    def forward(module: nn.Module, x: torch.Tensor, tape: Tape) -> torch.Tensor:
        return _weight(module) * _scaled(module, _wide(x), eps, tape).to(x.dtype)

    return forward


def late_rms_norm(*, eps: str) -> ForwardRule:
    """``weight * (x * scale)``, rounded to the model's dtype after the weight (OLMo 2)."""

    def forward(module: nn.Module, x: torch.Tensor, tape: Tape) -> torch.Tensor:
        return (_weight(module) * _scaled(module, _wide(x), eps, tape)).to(x.dtype)

    return forward


def offset_rms_norm(*, eps: str) -> ForwardRule:
    """Gemma's ``(1 + weight) * (x * scale)``, rounded to the model's dtype last."""

    def forward(module: nn.Module, x: torch.Tensor, tape: Tape) -> torch.Tensor:
        wide = _wide(x)
        return (_scaled(module, wide, eps, tape) * (1.0 + _weight(module).to(wide.dtype))).to(x.dtype)

    return forward


def layer_norm(*, eps: str, offset: float = 0.0) -> ForwardRule:
    """``(weight + offset) * ((x - mean x) * scale) + bias``, with a bias or without, rounded to the model's dtype last.

    The mean is linear and stays live. Nemotron's offset is 1.
    """

    def forward(module: nn.Module, x: torch.Tensor, tape: Tape) -> torch.Tensor:
        wide = _wide(x)
        centred = wide - wide.mean(-1, keepdim=True)
        normed = _scaled(module, centred, eps, tape) * (_weight(module) + offset).to(wide.dtype)
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
        return self._tape.factor(self._key[0], lambda: self.activation(gate), multiplies=gate)


class FrozenSlope(nn.Module):
    """``x * (act(x)/x)`` with the ratio frozen: for GELU, x times its gate Phi(x)."""

    def __init__(self, activation: nn.Module, owner: nn.Module, tape: Tape) -> None:
        super().__init__()
        self.activation = activation
        self._key, self._tape = (owner,), tape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The activation of ``x``, linear in it."""
        return x * self._tape.factor(self._key[0], lambda: frozen_ratio(self.activation, x), multiplies=x)


def frozen_ratio(activation: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """act(x)/x, without a gradient. At x = 0, where it is 0/0, it is its limit, by evaluating it at a tiny x."""
    tiny = torch.finfo(x.dtype).tiny ** 0.5
    safe = torch.where(x.abs() < tiny, torch.full_like(x, tiny), x).detach()
    return activation(safe) / safe


FROZEN_NOW: ContextVar[list[nn.Module]] = ContextVar("frozen_now")
"""While a model is detached: its attention modules, each as often as a frozen attention has computed it."""


def _note(module: nn.Module) -> None:
    frozen = FROZEN_NOW.get(None)
    if frozen is not None:
        frozen.append(module)


def frozen_sdpa(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
) -> AttentionOutput:
    """Scaled dot product attention whose softmax weights are constants for autograd."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    _note(module)
    attention: Callable[..., AttentionOutput] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return attention(module, query.detach(), key.detach(), value, *args, **kwargs)


def frozen_eager(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
) -> AttentionOutput:
    """The eager attention of the model's own file, soft-caps included, with weights that are constants for autograd."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise UnsupportedModelError(
            f"{type(module).__name__}: its file {type(module).__module__} has no eager_attention_forward to detach"
        )
    _note(module)
    attention: Callable[..., AttentionOutput] = own
    return attention(module, query.detach(), key.detach(), value, *args, **kwargs)


def with_weights(attention: Callable[..., AttentionOutput]) -> Callable[..., AttentionOutput]:
    """The same attention, returning its weights (b, H, n, n) too: its output for V = 1, the identity.

    This works for every implementation, since attention is linear in V, and gives the weights in its own precision,
    with its own masks and soft-caps.
    """

    def forward(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
    ) -> AttentionOutput:
        n = value.shape[-2]
        identity = torch.eye(n, dtype=value.dtype, device=value.device).expand(*value.shape[:2], n, n)
        output, _ = attention(module, query, key, value, *args, **kwargs)
        weights, _ = attention(module, query, key, identity, *args, **kwargs)
        # In one piece: every pass would copy them otherwise, and the graph of the backward passes keep the copies.
        return output, weights.transpose(1, 2).contiguous()

    return forward


class _ConvertedLinear(torch.autograd.Function):
    """x W^T, of a W that is converted for it, and in the dtype that it is converted to.

    W is converted anew for each product, forward and backward: a graph that kept converted weights would be a second
    copy of the model, in another dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, convert: _Conversion) -> torch.Tensor:
        ctx.weight, ctx.convert = weight, convert
        converted = convert(weight)
        return _rows(F.linear(_columns(x, converted), converted), x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        converted = ctx.convert(ctx.weight)
        # Not ``@``, of which vmap makes a product for each cotangent.
        return _rows(torch.mm(_columns(gradient, converted), converted), gradient), None, None


_Conversion = Callable[[torch.Tensor], torch.Tensor]


def _columns(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(..., k) -> (m, k), in the dtype of ``weight``."""
    return x.to(weight.dtype).reshape(-1, x.shape[-1])


def _rows(product: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(m, k) -> (..., k), in the dtype and with the leading axes of ``x``."""
    return product.to(x.dtype).view(*x.shape[:-1], product.shape[-1])


def wide_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias, with ``weight`` (out, in), in the precision of ``x``, or in that of :func:`products_in`."""
    rounding = _ROUNDING.get()
    if rounding is None and weight.dtype == x.dtype:
        # Flattened to two dimensions: for many inputs of one position each, torch would do as many small products.
        return F.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    convert = (lambda weight: weight.to(x.dtype)) if rounding is None else rounding.rounded
    product: torch.Tensor = _ConvertedLinear.apply(x, weight, convert)  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias.to(x.dtype)


class _Rounding:
    """Weights in another dtype, one at a time, in one piece of memory: to take new memory for each would take as long
    again as to round it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._numbers: torch.Tensor | None = None

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight``, in the dtype of all, until the next one."""
        if weight.dtype == self.dtype:
            return weight
        if self._numbers is None or len(self._numbers) < weight.numel():
            self._numbers = weight.new_empty(weight.numel(), dtype=self.dtype)
        # Laid out as ``weight.to`` does.
        strides = torch.empty_like(weight, device="meta").stride()
        return self._numbers.as_strided(weight.shape, strides).copy_(weight)

    def end(self) -> None:
        """Frees the memory, though graphs may be left that know of it."""
        self._numbers = None


_ROUNDING: ContextVar[_Rounding | None] = ContextVar("rounding", default=None)


@contextmanager
def products_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside the block, a replay's products with weights are made in ``dtype``; sums, factors and attention are not.

    A weight is rounded anew for each product. None means the precision of the vectors, as outside.
    """
    rounding = None if dtype is None else _Rounding(dtype)
    token = _ROUNDING.set(rounding)
    try:
        yield
    finally:
        _ROUNDING.reset(token)
        if rounding is not None:
            rounding.end()


def rounded_to() -> torch.dtype | None:
    """The dtype of the innermost :func:`products_in`."""
    rounding = _ROUNDING.get()
    return None if rounding is None else rounding.dtype


def mix(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention with given weights (H, m, n) on values (l, n, K, e) of K heads: (l, m, H e), one GEMM per value head.

    Query head h reads value head h // (H/K). The l inputs are laid side by side in the last axis of the product, so
    that the weights are read once for all of them.
    """
    inputs, n, heads, size = values.shape
    group = weights.shape[0] // heads
    stacked = values.permute(2, 1, 0, 3).reshape(heads, n, inputs * size)
    queries = weights.shape[1]
    mixed = torch.bmm(weights.to(values.dtype).reshape(heads, group * queries, n), stacked)
    return mixed.view(heads, group, queries, inputs, size).permute(3, 2, 0, 1, 4).reshape(inputs, queries, -1)


def _scaled(module: nn.Module, wide: torch.Tensor, eps: str, tape: Tape) -> torch.Tensor:
    def scale() -> torch.Tensor:
        return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + float(getattr(module, eps)))

    return wide * tape.factor(module, scale, multiplies=wide)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)  # noqa: S101 - for the type checker; every norm in a table has one
    return weight
