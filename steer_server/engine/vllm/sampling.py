"""A request's sampling in vLLM's words, and what of it vLLM would refuse or replace by something else."""

from __future__ import annotations

from typing import Any

from steer_server.engine.prompts import check_ids
from steer_server.errors import InvalidRequestError
from steer_server.types import SamplingParams

_COLDEST, _HOTTEST = 0.01, 2.0
"""vLLM's own bounds: it raises a temperature below the first one to it, and refuses one above the second."""


def check_sampling(sampling: SamplingParams, *, vocab_size: int, max_logprobs: int) -> None:
    """Raises :class:`InvalidRequestError`, which names the field, for what vLLM would not do as it is asked.

    Args:
        max_logprobs: vLLM's option; -1 stands for the whole vocabulary.
    """
    check_ids("sampling.stop_token_ids", sampling.stop_token_ids, vocab_size)
    temperature = sampling.temperature
    if temperature != 0.0 and not _COLDEST <= temperature <= _HOTTEST:
        raise InvalidRequestError(
            "sampling.temperature",
            f"is {temperature}; this engine (vllm) accepts 0 (greedy) and {_COLDEST:g} to {_HOTTEST:g}",
        )
    most = vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)
    if sampling.logprobs is not None and sampling.logprobs > most:
        raise InvalidRequestError(
            "sampling.logprobs",
            f"is {sampling.logprobs}; this engine (vllm) accepts 0 to {most}: max_logprobs is {max_logprobs}, and the "
            f"vocabulary has {vocab_size} tokens",
        )


def vllm_sampling(sampling: SamplingParams) -> dict[str, Any]:
    """Arguments of vLLM's ``SamplingParams`` that choose tokens and end a text; lengths and log-probabilities apart."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": _signed(sampling.seed),
        "stop_token_ids": list(sampling.stop_token_ids),
        # Which tokens end a text is decided here, as for the other engine: vLLM knows more of them.
        "ignore_eos": True,
    }


def _signed(seed: int) -> int:
    """The int64 of the same bits as a uint64: one of vLLM's two runners keeps seeds as int64.

    vLLM reads -1 as no seed at all. So the last uint64 draws the numbers of the one before it.
    """
    return min(seed - 2**64, -2) if seed >= 2**63 else seed
