"""The rows of a job while it is decoded: what is kept of each, how one ends, and what is read off its logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from steer_server.engine.distributions import compare_positions
from steer_server.engine.hf.sampling import Sampler
from steer_server.engine.hf.steering import RowSteering
from steer_server.engine.proof import Proof
from steer_server.engine.receipts import empty_receipts
from steer_server.engine.row_text import RowText
from steer_server.errors import EngineFailedError, SteeringNotAppliedError
from steer_server.types import FinishReason, Receipt, Report, RowFinished, Score, TokenLogprob, TopLogprob


@dataclass(eq=False)
class RowState:
    """One row of the job while it is being decoded. ``sequence``: ids of prompt and generated tokens."""

    index: int
    steering: RowSteering | None
    proof: Proof | None
    """Of the steering; None where there is none."""
    scored: bool
    report: Report
    """What a score says."""
    sampler: Sampler
    text: RowText
    sequence: list[int]

    @property
    def num_generated(self) -> int:
        """Tokens chosen so far."""
        return len(self.text.ids)


@dataclass(frozen=True, eq=False)
class BatchSlot:
    """One row of the batch: a row of the job, or its plain reference."""

    state: RowState
    reference: bool = False

    @property
    def steering(self) -> RowSteering | None:
        """Of the row; None for a plain one, and for a reference."""
        return None if self.reference else self.state.steering


def check_finite(slots: list[BatchSlot], logits: torch.Tensor) -> None:
    """Raises, for logits (B, ..., V) that are not finite, the error of whoever made them so.

    Raises:
        SteeringNotAppliedError: a steered row's.
        EngineFailedError: a plain row's.
    """
    # What is not a number is both the least and the greatest. Looking at every number takes fifty times as long.
    least, greatest = (found.tolist() for found in (logits.flatten(1).amin(-1), logits.flatten(1).amax(-1)))
    for slot, low, high in zip(slots, least, greatest, strict=True):
        if math.isfinite(low) and math.isfinite(high):
            continue
        if slot.steering is None:
            raise EngineFailedError(f"the model's logits of token {slot.state.num_generated} are not finite")
        raise SteeringNotAppliedError(
            f"{slot.steering.describe()} makes the logits of token {slot.state.num_generated} not finite; "
            "a smaller strength is needed"
        )


def end_row(state: RowState, reason: FinishReason, stop_string: str) -> RowFinished:
    """The end of a row, with its receipts. Raises :class:`SteeringNotAppliedError` where they cannot be proved."""
    text = "" if stop_string else state.text.flush()
    steering, proof = state.steering, state.proof
    if steering is None or proof is None:
        receipts: tuple[Receipt, ...] = ()
    elif state.num_generated:
        # The last token of a text is never fed.
        proof.require(0, len(state.sequence) - 1)
        receipts = steering.receipts(proof)
    else:
        # Interrupted before its first token, perhaps amid the prompt: no text came of what was steered.
        receipts = empty_receipts(steering.plan)
    doses = () if steering is None else tuple(steering.generated_doses)
    return RowFinished(state.index, reason, text, stop_string, receipts, doses=doses)


def end_all(slots: list[BatchSlot], reason: FinishReason) -> Iterator[RowFinished]:
    """Ends every row of the job for one reason."""
    for slot in slots:
        if not slot.reference:
            yield end_row(slot.state, reason, "")


def score_token(token: int, logits: torch.Tensor, plain: torch.Tensor, report: Report) -> Score:
    """A token under the plain model and under this row, from the logits (V,) of both."""
    return compare_positions(plain[None], logits[None], (token,), report)[0]


def token_logprob(token: int, logits: torch.Tensor, count: int, tokenizer: Any) -> TokenLogprob:
    """Log-probability of a token, and its ``count`` most likely alternatives, from the logits (V,) that it was of."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(count)
    top = tuple(
        TopLogprob(other, str(tokenizer.decode([other])), value)
        for value, other in zip(values.tolist(), ids.tolist(), strict=True)
    )
    return TokenLogprob(token, str(tokenizer.decode([token])), float(logprobs[token]), top)
