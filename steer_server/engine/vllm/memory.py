"""How vLLM's share of a machine's memory is divided: what steering may take of it, and what is free for both.

vLLM fills its share with weights, activations and the KV cache, which gets what is left. Steering's memory (operators,
pushes, kept hidden states) is taken off that rest before the cache is sized, so that both fit into the share.
"""

from __future__ import annotations

from operators.core.capacity import format_bytes
from steer_server.config import OPERATOR_MEMORY

_KEPT_FREE = 0.08
"""Of all memory: what vLLM leaves by default where nothing else is in use."""
CHUNK_BYTES = 4 << 20
"""Of each tensor with which pushes are worked out and applied, whatever the step: what is larger goes in parts."""
SCORE_BYTES = 12 << 20
"""Of the logits, in float32, of the positions that are scored at once."""
_STEERING_PART = 8
"""Steering gets this part of vLLM's share at most, where the user has not said how much."""


def share_of_free(total: int, available: int, workers: int) -> float:
    """The share of ``total`` bytes that each of ``workers`` workers may take where ``available`` bytes are not in use.

    8 % of all memory stays free, as with vLLM's own default; but a quarter of what is available at most.
    """
    left = available - min(_KEPT_FREE * total, available / 4)
    return max(0.0, left / total / workers)


def default_steering_memory(share_bytes: int) -> int:
    """Bytes for steering where the user has not said: 4 GiB, at most an eighth of vLLM's share, a power of two.

    A power of two, because vLLM compiles the model anew whenever a number in its configuration changes.
    """
    part = max(1, share_bytes // _STEERING_PART)
    return min(OPERATOR_MEMORY, 1 << (part.bit_length() - 1))


def cache_memory(rest: int, steering: int, share: float) -> int:
    """Bytes of the KV cache: the rest of vLLM's share beside weights and activations, without steering's memory.

    Raises :class:`ValueError` where nothing is left for the cache.
    """
    if rest <= steering:
        raise ValueError(
            f"gpu_memory_utilization {share:.3g} leaves {format_bytes(max(rest, 0))} beside weights and activations, "
            f"and steering takes {format_bytes(steering)} of them (--operator-memory): nothing is left for the KV cache"
        )
    return rest - steering
