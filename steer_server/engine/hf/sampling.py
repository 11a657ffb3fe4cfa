"""Choosing the next token of one row, with the processors of transformers in the order in which vLLM has them.

The order matters: min-p, top-k and top-p each look at what the ones before have left. That of transformers'
``generate`` ends with min-p, vLLM's begins with it, and one request must mean one distribution on both engines.
"""

from __future__ import annotations

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
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

    def __init__(self, params: SamplingParams, device: torch.device) -> None:
        self._processors = LogitsProcessorList()
        if params.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        self._random = params.temperature >= _MIN_TEMPERATURE
        if self._random:
            self._processors.extend(_warpers(params))
            self._generator = torch.Generator(device).manual_seed(params.seed)

    def choose(self, sequence: torch.Tensor, logits: torch.Tensor) -> int:
        """The next token of ``sequence`` (T,), given its logits (V,) in float32."""
        scores = self._processors(sequence[None], logits[None])[0]
        if not self._random:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


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
