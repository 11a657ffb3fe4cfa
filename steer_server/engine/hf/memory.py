"""How much memory decoding a job takes, and how much the jobs that are decoded at once may take together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from operators.core.capacity import format_bytes, free_memory
from operators.model.loading import LoadedModel
from steer_server.errors import InvalidRequestError
from steer_server.types import DecodeJob
from steer_server.types.requests import DEFAULT_MAX_TOKENS

_SHARE_OF_FREE = 0.5
_LOGITS_COPIES = 4
"""Of the logits of a step in float32: as the model gives them, as scored, sorted and drawn from."""
_KEPT_FOR_OTHERS = 4
"""One part in so many is left to clients that have nothing running."""


_KEPT_BESIDE_LONGEST = 4
"""One part in so many may be taken by a text that is as long as there is room for: others run beside it."""


_SCORED_LOGITS = 64 << 20
"""Bytes of the logits in float32 of one pass over a text that is scored, all rows together."""


_PREFILL_POSITIONS = {"cpu": 256}
_PREFILL_POSITIONS_ELSEWHERE = 4096


def prefill_positions(device: torch.device) -> int:
    """Rows x tokens of a prompt in one turn: on a CPU about a second of a small model, and few megabytes of states."""
    return _PREFILL_POSITIONS.get(device.type, _PREFILL_POSITIONS_ELSEWHERE)


def scored_positions(rows: int, vocabulary: int) -> int:
    """Tokens of a text that is scored, in one pass of so many rows."""
    return max(1, _SCORED_LOGITS // (4 * rows * vocabulary))


@dataclass(frozen=True)
class DecodeMemory:
    """What a token of a row, and a row of a step, take. Bytes."""

    budget: int
    per_token: int
    """Keys and values of all layers."""
    per_row: int
    """Logits of a step."""
    context_length: int

    @classmethod
    def of(cls, loaded: LoadedModel, budget: int | None) -> DecodeMemory:
        """Measured on one token. ``budget``: None for half of the memory that is free now."""
        cache = DynamicCache(config=loaded.model.config)
        with torch.inference_mode():
            ids = torch.zeros(1, 1, dtype=torch.long, device=loaded.device)
            logits = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        states = [state for layer in cache.layers for state in (layer.keys, layer.values) if state is not None]
        return cls(
            budget=int(_SHARE_OF_FREE * free_memory(loaded.device)) if budget is None else budget,
            per_token=sum(state.nbytes for state in states),
            per_row=_LOGITS_COPIES * 4 * logits.shape[-1],
            context_length=loaded.context_length,
        )

    def needed(self, job: DecodeJob) -> int:
        """Bytes of a job at its end: a row's plain reference is a row too.

        Raises :class:`InvalidRequestError`, with the figures, for one that does not fit alone.
        """
        # A row that is scored has a plain reference of its length. A given text has one for all rows: the first.
        lengths = [
            min(len(job.prompt_ids) + row.sampling.max_tokens, self.context_length)
            for row in job.rows
            for _ in range(1 + (row.score and row.plan is not None and not job.forced_ids))
        ]
        rows, tokens, positions = len(lengths), max(lengths), 1
        if job.forced_ids:
            positions = min(scored_positions(rows, self.per_row // (4 * _LOGITS_COPIES)), len(job.forced_ids))
        need = sum(lengths) * self.per_token + rows * positions * self.per_row
        # A text that may have fewer tokens, and is longer than the usual one, leaves room for others beside it.
        leaves = any(row.sampling.fit_max_tokens and row.sampling.max_tokens > DEFAULT_MAX_TOKENS for row in job.rows)
        if need > self.budget // (_KEPT_BESIDE_LONGEST if leaves else 1):
            most = max(0, (self.budget // rows - positions * self.per_row) // self.per_token - len(job.prompt_ids))
            raise InvalidRequestError(
                "sampling.max_tokens",
                f"{rows} rows (with those that score) of up to {tokens} tokens take {format_bytes(need)} for keys, "
                f"values and logits; this server has {format_bytes(self.budget)} for them (--decode-memory), enough "
                f"for {most} tokens after this prompt, or for fewer arms",
            )
        return need

    def fits(self, need: int, taken: int, *, has_others: bool) -> bool:
        """Whether a job can begin beside what is ``taken``; ``has_others``: its client has jobs running already."""
        kept = self.budget // _KEPT_FOR_OTHERS if has_others else 0
        return need + taken <= self.budget - kept
