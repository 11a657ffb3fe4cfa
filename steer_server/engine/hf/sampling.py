"""Choosing the next token of one row, with the processors of transformers in the order in which vLLM has them.

The order matters: a penalty for repetition scales what biases have added, and min-p, top-k and top-p each look at what
the ones before have left. That of transformers' ``generate`` ends with min-p, vLLM's has it before top-k, and one
request must mean one distribution on both engines.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steer_server.types import SamplingParams

_MIN_TEMPERATURE = 1e-30
"""Below this temperature logits / temperature can overflow float32, and sampling is greedy in effect: so it is done."""


class Sampler:
    """Greedy or random choice.

    Each row has a random generator of its own: rows with the same seed draw the same numbers, so that the arms of a
    comparison differ by steering alone, and a request gives the same text in any batch.
    """

    def __init__(
        self, params: SamplingParams, device: torch.device, *, prompt_tokens: int = 0, ending_ids: Collection[int] = ()
    ) -> None:
        """``ending_ids``: what may not be chosen before ``min_tokens``."""
        self._processors = LogitsProcessorList()
        if params.min_tokens and ending_ids:
            least = (prompt_tokens, params.min_tokens, sorted(ending_ids))
            self._processors.append(MinNewTokensLengthLogitsProcessor(*least, device=str(device)))
        if params.logit_bias:
            biases = {(each.token_id,): float(each.bias) for each in params.logit_bias}
            self._processors.append(SequenceBiasLogitsProcessor(biases))
        if params.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        if params.frequency_penalty or params.presence_penalty:
            self._processors.append(_CountPenalties(params, prompt_tokens))
        self._random = params.temperature >= _MIN_TEMPERATURE
        if self._random:
            self._processors.extend(_warpers(params))
            self._generator = torch.Generator(device).manual_seed(params.seed)

    @property
    def takes_likeliest(self) -> bool:
        """Whether it always chooses the token with the highest logit."""
        return not self._random and not self._processors

    def choose(self, sequence: torch.Tensor, logits: torch.Tensor) -> int:
        """The next token of ``sequence`` (T,), given its logits (V,) in float32."""
        scores = self._processors(sequence[None], logits[None])[0]
        if not self._random:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


class _CountPenalties:
    """Penalties for frequency and presence of generated tokens, as OpenAI and vLLM define them.

    score − frequency_penalty × count − presence_penalty × [count > 0]
    """

    def __init__(self, params: SamplingParams, prompt_tokens: int) -> None:
        self._frequency, self._presence = params.frequency_penalty, params.presence_penalty
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (1, V) after ``input_ids`` (1, T)."""
        counts = torch.bincount(input_ids[0, self._prompt_tokens :], minlength=scores.shape[-1])
        # In vLLM's order: float32 rounds after each.
        return scores - self._frequency * counts - self._presence * (counts > 0)


def _warpers(params: SamplingParams) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if params.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.min_p > 0.0:
        warpers.append(MinPLogitsWarper(params.min_p))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    return warpers
