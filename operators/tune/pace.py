"""How fast this machine decodes: what is told of the time that a search would take."""

from __future__ import annotations

import time
from collections.abc import Sequence

from operators.core.measured import Sampling
from operators.model.loading import LoadedModel
from operators.model.text_ids import text_ids
from operators.tune.continuations import ContinuationRequest, decode_continuations

_ROWS, _TOKENS = 32, 4


def seconds_per_row_token(loaded: LoadedModel, prompts: Sequence[str], sampling: Sampling) -> float:
    """Measured on a batch of plain texts: what a token of one row takes, its prompt's share included."""
    ids = [text_ids(loaded.tokenizer, prompt) for prompt in (tuple(prompts) * _ROWS)[:_ROWS]]
    requests = [ContinuationRequest(each) for each in ids]
    decode_continuations(requests[:2], loaded, tokens=2)
    start = time.monotonic()
    decode_continuations(requests, loaded, tokens=_TOKENS, sampling=sampling)
    return (time.monotonic() - start) / (len(requests) * _TOKENS)
