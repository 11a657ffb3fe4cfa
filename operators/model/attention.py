"""What computes a model's attention: its own code (eager), or torch's fused one (sdpa) where that is the same.

The fused one knows queries, keys, values, a mask and a scale. What else a model's own attention does with its logits
(a soft-cap, a sink that takes part of the softmax) it leaves out, without an error.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from operators.core.errors import ModelError
from operators.core.header import AttentionName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLERANCE = 1e-4
"""Of the relative difference in float64; sound pairs differ by 1e-7, what eager's softmax is rounded to."""
_LOGIT_SIZES = (1.0, 20.0)
"""Standard deviations of the logits that are compared: a sink shows among small ones, a soft-cap among large ones."""
_TOKENS, _LAYERS = 12, 8
"""What is compared: so many tokens, in so many of the first layers, of which neighbours may have different kinds."""
_SOFT_CAPS = ("attn_logit_softcapping", "attn_logit_softcap", "attention_logit_cap")
_COMPARED = "compared_sdpa"


def choose_attention(model: PreTrainedModel, asked: AttentionName | None) -> AttentionName:
    """What a model is computed with: as asked, or sdpa where the model has it and its configuration no soft-cap.

    Args:
        model: its class and configuration matter, so that one without weights will do.

    Raises:
        ModelError: the model has no sdpa.
    """
    has_sdpa = bool(model._supports_sdpa)
    if asked == "sdpa" and not has_sdpa:
        raise ModelError(f"{type(model).__name__} has no attention 'sdpa'; 'eager' is accepted (--attention eager)")
    if asked is not None:
        return asked
    config = model.config.get_text_config()
    return "sdpa" if has_sdpa and not any(getattr(config, name, None) for name in _SOFT_CAPS) else "eager"


def check_attention(name: str, model: PreTrainedModel) -> None:
    """Compares sdpa with the model's own attention, where the model was loaded with sdpa.

    In the first layers, for random queries, keys and values, in float64; with the mask, scale and parameters that the
    model gives to its attention for a short text.

    Raises:
        ModelError: they differ; says where and by how much.
    """
    implementation = model.config._attn_implementation
    if implementation != "sdpa":
        return
    differences: dict[nn.Module, float] = {}
    token = _DIFFERENCES.set(differences)
    model.set_attn_implementation(_COMPARED)
    try:
        ids = torch.arange(_TOKENS, device=model.device) % int(model.config.get_text_config().vocab_size)
        with torch.inference_mode():
            model.get_decoder()(input_ids=ids[None], use_cache=False)
    except _EnoughError:
        pass
    finally:
        model.set_attn_implementation(implementation)
        _DIFFERENCES.reset(token)
    for module, difference in differences.items():
        # Negated, so that NaN is refused too.
        if not difference <= _TOLERANCE:
            raise ModelError(
                f"model {name!r}: attention 'sdpa' leaves out what {type(module).__name__} does (layer "
                f"{getattr(module, 'layer_idx', '?')}: it differs by {difference:.1e}); 'eager' is accepted "
                "(--attention eager)"
            )


_DIFFERENCES: ContextVar[dict[nn.Module, float]] = ContextVar("differences")


class _EnoughError(Exception):
    """Ends the forward pass once enough layers were compared."""


def _compared(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    differences = _DIFFERENCES.get()
    if len(differences) == _LAYERS:
        raise _EnoughError
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is not None:
        differences[module] = max(
            _difference(eager, size, module, query, key, value, attention_mask, *args, **kwargs)
            for size in _LOGIT_SIZES
        )
    output: tuple[torch.Tensor, torch.Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, *args, **kwargs
    )
    return output


def _difference(
    eager: Any,
    size: float,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> float:
    """|sdpa - eager| / |eager| for random vectors of the shapes given, whose logits have the standard deviation."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.device)
        for part in (query, key, value)
    )
    scaling = kwargs.get("scaling")
    if scaling is None:
        scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
    q = q * (size / (scaling * query.shape[-1] ** 0.5))
    wide = None if mask is None or mask.dtype == torch.bool else mask.double()
    fused, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask if wide is None else wide, *args, **kwargs)
    own, _ = eager(module, q, k, v, _additive(mask, q) if wide is None else wide, *args, **kwargs)
    return float(torch.linalg.vector_norm(fused.double() - own.double()) / torch.linalg.vector_norm(own.double()))


def _additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    """The mask as eager attention takes it: what is added to the logits. None is the causal mask to sdpa."""
    n = query.shape[-2]
    seen = mask if mask is not None else torch.ones(n, n, dtype=torch.bool, device=query.device).tril()[None, None]
    return torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(
        ~seen, torch.finfo(query.dtype).min
    )


AttentionInterface.register(_COMPARED, _compared)
AttentionMaskInterface.register(_COMPARED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
