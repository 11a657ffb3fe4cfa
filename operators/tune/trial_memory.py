"""How many texts a batch of a trial may have within the memory."""

from __future__ import annotations

import torch

from operators.builder.memory import MemoryEstimate, rows_within
from operators.model.loading import LoadedModel, decoder_layers

_LOGITS_COPIES = 6
"""Arrays of the size of the logits, in float32, that are alive at once where texts are written and compared."""


def texts_within(max_memory: int, loaded: LoadedModel, length: int, limit: int) -> int:
    """How many texts of at most ``length`` tokens, prompts included, fit beside the model; at most ``limit``.

    Raises :class:`BuildError` where not even one does; it says how much is needed.
    """
    return rows_within(
        max_memory,
        estimate_trial(loaded, length),
        limit,
        f"a text of {length} tokens of {loaded.name}, its prompt included,",
        "shorter prompts or texts, or a lower rank need less",
    )


def estimate_trial(loaded: LoadedModel, length: int) -> MemoryEstimate:
    """The trial of texts of at most ``length`` tokens, prompts included: a row is one text."""
    config = loaded.model.config.get_text_config()
    d, heads = loaded.hidden_size, int(config.num_attention_heads)
    # GPT-2 has neither attribute: all its heads have keys, of d / heads numbers.
    keys = (getattr(config, "num_key_value_heads", None) or heads) * (getattr(config, "head_dim", None) or d // heads)
    weights = (parameter for parameter in decoder_layers(loaded.model)[0].parameters() if parameter.dim() == 2)
    inner = max(max(weight.shape) for weight in weights)
    # Keys and values of every layer, which are copied as they grow.
    cache = 2 * 2 * loaded.num_layers * length * keys
    # What one block works on while a prompt is read: stream, inner layer, attention weights.
    block = length * (6 * d + 2 * inner + heads * length)
    logits = _LOGITS_COPIES * int(config.vocab_size) * torch.promote_types(loaded.dtype, torch.float32).itemsize
    # Twice: the steered text, and the plain model that reads it too.
    return MemoryEstimate(fixed=0, per_row=2 * ((cache + block) * loaded.dtype.itemsize + logits))
