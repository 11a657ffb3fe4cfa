"""What tells one model, and one tokenizer, from another."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FINGERPRINT_SAMPLES = 64
# Of a model's configuration: what changes its map without changing a weight.
_FORWARD_SETTINGS = (
    *("hidden_act", "hidden_activation", "activation_function", "rms_norm_eps", "layer_norm_epsilon"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *("layer_norm_eps", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
    *("rope_parameters", "sliding_window", "layer_types", "final_logit_softcapping", "tie_word_embeddings"),
)
_TOKENIZER_PROBE = "The Golden Gate Bridge, 1937: café, naïve, 東京, 🌉\n\tdef f(x): return x"


def model_fingerprint(model: PreTrainedModel) -> str:
    """sha256 over what the map depends on: the settings of the forward pass, and every parameter's name, shape and a
    strided sample of its values in bfloat16.

    The same for any dtype that the model is loaded in, and cheap for any size. It tells checkpoints apart;
    it is not a defence against somebody who wants two to look the same.
    """
    config = model.config.get_text_config()
    settings = {name: getattr(config, name) for name in _FORWARD_SETTINGS if hasattr(config, name)}
    described = json.dumps([type(model).__name__, settings], sort_keys=True, default=str)
    digest = hashlib.sha256(described.encode())
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().reshape(-1)
        step = max(1, values.numel() // _FINGERPRINT_SAMPLES)
        sample = values[::step].to(torch.bfloat16).contiguous().cpu().view(torch.uint8).numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + sample)
    return f"sha256:{digest.hexdigest()}"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the vocabulary and over what the tokenizer makes of a probe text."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    probe = tokenizer(_TOKENIZER_PROBE)["input_ids"]
    return f"sha256:{hashlib.sha256(f'{vocabulary}{probe}'.encode()).hexdigest()}"
