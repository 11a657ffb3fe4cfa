"""A request's sampling as arguments of vLLM, and a check for values that vLLM would refuse or silently change."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from steer_server.engine.prompts import check_sampled_ids
from steer_server.errors import InvalidRequestError
from steer_server.types import SamplingParams

_MAX_BARRED = 128
"""Tokens that one of vLLM's two runners can bar before ``min_tokens``; with more, it ends."""
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 2.0
"""vLLM's own bounds: it raises a lower temperature to the first one, and refuses a higher one than the second."""


def check_sampling(sampling: SamplingParams, *, vocab_size: int, max_logprobs: int, num_eos: int = 1) -> None:
    """Raises :class:`InvalidRequestError`, which names the field, for a value that vLLM would refuse or change.

    Args:
        max_logprobs: vLLM's option; -1 stands for the whole vocabulary.
        num_eos: end-of-sequence tokens of the model.
    """
    check_sampled_ids(sampling, vocab_size)
    temperature = sampling.temperature
    if temperature != 0.0 and not _MIN_TEMPERATURE <= temperature <= _MAX_TEMPERATURE:
        raise InvalidRequestError(
            "sampling.temperature",
            f"is {temperature}; this engine (vllm) accepts 0 (greedy) and {_MIN_TEMPERATURE:g} to {_MAX_TEMPERATURE:g}",
        )
    limit = vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)
    if sampling.logprobs is not None and sampling.logprobs > limit:
        raise InvalidRequestError(
            "sampling.logprobs",
            f"is {sampling.logprobs}; this engine (vllm) accepts 0 to {limit}: max_logprobs is {max_logprobs}, and the "
            f"vocabulary has {vocab_size} tokens",
        )
    ends = len(sampling.stop_token_ids) + len(sampling.stop_strings) + num_eos
    if sampling.min_tokens and ends > _MAX_BARRED:
        raise InvalidRequestError(
            "sampling.min_tokens",
            f"is {sampling.min_tokens}, beside {ends} stop strings, stop tokens and ends of sequence; this engine "
            f"(vllm) accepts it beside at most {_MAX_BARRED}",
        )


def vllm_sampling(sampling: SamplingParams, ending_ids: Collection[int] = ()) -> dict[str, Any]:
    """Arguments of vLLM's ``SamplingParams`` that choose and stop at tokens; without lengths and log-probabilities.

    ``ending_ids``: what may not be chosen before ``min_tokens``. vLLM bars its stop tokens.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": _signed(sampling.seed),
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": {each.token_id: each.bias for each in sampling.logit_bias} or None,
        "stop_token_ids": sorted(ending_ids) if sampling.min_tokens else list(sampling.stop_token_ids),
        # The server ends a text at the model's EOS tokens itself, alike for both engines; vLLM stops at others too.
        "ignore_eos": True,
    }


def _signed(seed: int) -> int:
    """The int64 with the bits of a uint64: one of vLLM's two runners keeps seeds as int64.

    To vLLM, -1 means no seed, so the largest uint64 gives the same text as the second largest.
    """
    return min(seed - 2**64, -2) if seed >= 2**63 else seed
