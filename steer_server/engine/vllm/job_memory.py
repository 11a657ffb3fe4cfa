"""What a job takes of a worker's memory for steering beside its operators, and whether that is more than there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from operators.core.capacity import format_bytes
from steer_server.engine.vllm.memory import CHUNK_BYTES, SCORE_BYTES
from steer_server.errors import InvalidRequestError
from steer_server.types import DecodeJob, Row

_CHUNKS = 12
"""Tensors of a chunk that are alive at once while pushes are worked out and applied."""
SCORING_BYTES = 8 * SCORE_BYTES
"""Tensors of the logits of a call that scores."""
_MEASURED_BYTES = 1024
"""Per pushed row and layer: its measurements in the steps that have not been read yet."""
_SCORED = 2
"""Requests whose hidden states a score is made of: the steered one and its plain twin."""


@dataclass(frozen=True)
class StepSizes:
    """What the memory of a step depends on. Filled by the engine, from vLLM's configuration."""

    tokens: int
    """The most of one step."""
    width: int
    """d."""
    itemsize: int
    """Bytes of a number of the hidden states."""

    def pushes(self, layers: int) -> int:
        """Bytes of the pushes of a step whose requests are pushed at so many layers each, at most; 0 for none.

        Embeddings (T, d) in both dtypes, a sum (T, d) of float32 per layer, and what is made of one chunk after
        another, of a step or of a text that is scored.
        """
        if not layers:
            return 0
        per_layer = self.tokens * (4 * self.width + _MEASURED_BYTES)
        chunks = _CHUNKS * CHUNK_BYTES + SCORING_BYTES
        return self.tokens * self.width * (4 + self.itemsize) + layers * per_layer + chunks

    def states(self, tokens: int, requests: int = _SCORED) -> int:
        """Bytes of the hidden states that so many requests keep to score a text of so many tokens."""
        return requests * tokens * self.width * self.itemsize


@dataclass(frozen=True)
class JobMemory:
    """What one job takes."""

    layers: int = 0
    """At how many layers its rows are pushed, at most."""
    held: int = 0
    """Bytes from its beginning to its end: hidden states for scores, and running sums."""


def job_memory(job: DecodeJob, sizes: StepSizes, *, budget: int, context_length: int) -> JobMemory:
    """What a job takes beside its operators.

    Raises :class:`InvalidRequestError` where that alone is more than ``budget`` bytes.
    """
    layers = max((len(_layers(row)) for row in job.rows), default=0)
    if job.forced_ids:
        # Every row reads the same text, the plain one for all. Logits are made of it where nothing is pushed, too.
        lengths = [len(job.forced_ids)] * len(job.rows)
        states = sizes.states(len(job.forced_ids), len(job.rows)) + (0 if layers else SCORING_BYTES)
    else:
        lengths = [
            min(row.sampling.max_tokens, context_length - len(job.prompt_ids))
            for row in job.rows
            if row.score and not row.is_plain_score
        ]
        states = sum(map(sizes.states, lengths))
    memory = JobMemory(layers, states + _running_sums(job.rows))
    pushes = sizes.pushes(layers)
    if pushes + memory.held <= budget:
        return memory
    kept = f"this server keeps {format_bytes(budget)} for steering (--operator-memory)"
    if pushes > budget:
        raise InvalidRequestError(
            "operators", f"push at {layers} layers, which takes {format_bytes(pushes)} in a step; {kept}"
        )
    raise InvalidRequestError(
        "sampling.max_tokens",
        f"lets the scores of {len(lengths)} texts of up to {max(lengths, default=0)} tokens keep "
        f"{format_bytes(states)} of hidden states, beside {format_bytes(pushes)} for pushes; {kept}",
    )


def _layers(row: Row) -> set[int]:
    return set() if row.plan is None else {use.layer for use in row.plan.applications if use.setting.strength}


def _running_sums(rows: Sequence[Row]) -> int:
    uses = (use for row in rows if row.plan is not None for use in row.plan.applications if use.setting.strength)
    # Twice: a step makes the new ones beside the old ones.
    return sum(2 * 4 * use.artifact.factors.shape[1] for use in uses)
