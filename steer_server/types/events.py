"""What an engine answers, event by event."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

from operators.core.header import Anchor, FirstToken, Rule
from operators.core.positions import Positions


class FinishReason(StrEnum):
    """Why a text ended."""

    EOS = "EOS"
    STOP_STRING = "STOP_STRING"
    STOP_TOKEN = "STOP_TOKEN"
    MAX_TOKENS = "MAX_TOKENS"
    CONTEXT_LIMIT = "CONTEXT_LIMIT"
    TIME_LIMIT = "TIME_LIMIT"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at a position."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token under the row's own model, before temperature and truncation; in nats."""

    token_id: int
    token: str
    logprob: float
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """One position of a text: KL(plain || row), and the token's log-probability under the plain model and the row's own
    before temperature and truncation; in nats.
    """

    kl: float
    plain_logprob: float
    logprob: float
    gained: tuple[tuple[int, float], ...] = ()
    """By :class:`.jobs.Report`: tokens that only the row has among its likeliest, with its log-probabilities."""
    lost: tuple[tuple[int, float], ...] = ()
    """Those that only the plain model has, with the plain model's."""
    words: tuple[tuple[float, float], ...] = ()
    """The probability of each word under the plain model and the row's own."""


@dataclass(frozen=True)
class SteeredWord:
    """A word as a lens read it: whose rows of the unembedding its direction was made of."""

    text: str
    weight: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Receipt:
    """What one operator did to one row, measured on the hidden states. Filled by the engine."""

    operator: str
    digest: str
    layer: int
    rule: Rule
    strength: float
    blend: float
    positions: Positions
    anchor: Anchor
    first_token: FirstToken
    prompt_tokens_steered: int
    generated_tokens_steered: int
    prompt_tokens_cached: int
    """Whose keys and values an earlier request with the very same steering left: not computed, so not measured."""
    mean_dose: float
    max_dose: float
    dose_bound: float
    """Of the layer: sum of |lambda|/2 over its operators."""
    defaulted: tuple[str, ...]
    calibrated: bool
    words: tuple[SteeredWord, ...] = ()
    """Of a lens; ``digest`` is then that of the direction that they make."""
    lens_digest: str = ""
    kl: float | None = None
    """The p95 KL in nats that the strength was read off the dose curve for; None where it was not."""
    positions_checked: int = 0
    """At how many of the steered positions what was added was held against the operators' direction."""
    worst_cosine: float | None = None
    """The smallest cosine found there; None where none was checked."""


@dataclass(frozen=True)
class Admitted:
    """The job has left the queue. ``at``, in every event: when it happened, in seconds of the monotonic clock."""

    at: float = field(default_factory=time.monotonic, compare=False)


@dataclass(frozen=True)
class TokenEvent:
    """One token of one row."""

    row: int
    token_id: int
    text: str
    logprob: TokenLogprob | None = None
    score: Score | None = None
    at: float = field(default_factory=time.monotonic, compare=False)


@dataclass(frozen=True)
class RowFinished:
    """The end of one row. ``text`` is what was still held back.

    ``scores`` are those of all its tokens, from an engine that scores a text when it is whole.
    """

    row: int
    reason: FinishReason
    text: str
    stop_string: str
    receipts: tuple[Receipt, ...]
    scores: tuple[Score, ...] = ()
    doses: tuple[float, ...] = ()
    """Where they are reported: at the lowest layer that the row is pushed at, of each generated token that was fed."""
    at: float = field(default_factory=time.monotonic, compare=False)


EngineEvent = Admitted | TokenEvent | RowFinished
