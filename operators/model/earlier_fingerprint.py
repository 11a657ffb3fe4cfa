"""The fingerprint of earlier versions, which read a sample of the weights: only to renew what they signed."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

from operators.model.fingerprints import forward_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES = 64
"""Of each parameter."""


def earlier_fingerprint(model: PreTrainedModel) -> str:
    """What an earlier version gave for this model: two models that differ may have the same."""
    settings = forward_settings(model.config.get_text_config())
    described = json.dumps([type(model).__name__, settings], sort_keys=True, default=str)
    digest = hashlib.sha256(described.encode())
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().reshape(-1)
        step = max(1, values.numel() // _SAMPLES)
        sample = values[::step].to(torch.bfloat16).contiguous().cpu().view(torch.uint8).numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + sample)
    return f"sha256:{digest.hexdigest()}"
