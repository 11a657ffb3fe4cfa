"""What a caller is answered. The fields are those of the messages of the same meaning in the contract."""

from __future__ import annotations

from dataclasses import dataclass, field

from steer_server.types.events import FinishReason, Receipt, Score, TokenLogprob, TopLogprob


@dataclass(frozen=True)
class Timings:
    """Seconds from entering the queue."""

    queued: float
    time_to_first_token: float | None
    """None where there was no token."""
    total: float
    began: float = field(default=0.0, compare=False)
    """When it entered the queue, in seconds of the monotonic clock. Not sent."""


@dataclass(frozen=True)
class Usage:
    """Tokens read and produced; the token that ended the text counts."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Completion:
    """A finished continuation. Filled by ``generate``."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_string: str
    usage: Usage
    timings: Timings
    receipts: tuple[Receipt, ...]
    logprobs: tuple[TokenLogprob, ...]
    seed: int
    scores: tuple[Score, ...] = ()
    """Of its tokens, where they were asked for. Not sent: a comparison is made of them."""
    doses: tuple[float, ...] = ()
    """Of those that were fed; not sent either."""
    sample: int = 0


@dataclass(frozen=True)
class Started:
    """The prompt as the model gets it. First event of every stream."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    operators: tuple[tuple[str, str], ...] = ()
    """Name and digest of each that is applied. Not sent."""
    sample: int = 0
    """Of its arm, here and in every event of a text. Sent with the event."""


@dataclass(frozen=True)
class Delta:
    """New text; may be empty."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    seconds: float | None = None
    """Since the token before; None at the first. Not sent."""
    sample: int = 0


GenerateEvent = Started | Delta | Completion


@dataclass(frozen=True)
class ArmEvent:
    """One event of one arm. ``prompt_id``: of several prompts, which."""

    arm: str
    event: GenerateEvent
    prompt_id: str = ""


@dataclass(frozen=True, slots=True)
class WordMass:
    """The probability that a text goes on with a word, under the plain model and under an arm."""

    word: str
    normal: float
    arm: float


@dataclass(frozen=True, slots=True)
class TokenComparison:
    """A token of a text under an arm and under the plain model, before temperature and truncation; in nats."""

    token_id: int
    token: str
    logprob: float
    normal_logprob: float
    kl: float
    """KL(plain || arm)."""
    gained: tuple[TopLogprob, ...] = ()
    lost: tuple[TopLogprob, ...] = ()
    words: tuple[WordMass, ...] = ()
    dose: float | None = None
    """At the position that is fed the token; None where none is, or nothing is reported."""


@dataclass(frozen=True)
class Comparison:
    """A text of one arm held against the plain one of the same sample. KL in nats; None and empty where not scored.

    Without a plain arm, what needs it is None.
    """

    arm: str
    first_divergence: int | None
    kl_per_token: tuple[float, ...]
    kl_mean: float | None
    kl_p95: float | None
    normal_perplexity: float | None
    steered_perplexity: float | None
    sample: int = 0
    tokens: tuple[TokenComparison, ...] = ()
    """Of the arm's text, where a report was asked for."""


@dataclass(frozen=True)
class Compared:
    """Last event of a prompt: one entry per arm and sample, the plain one apart."""

    comparisons: tuple[Comparison, ...]
    prompt_id: str = ""


CompareEvent = ArmEvent | Compared


@dataclass(frozen=True)
class ArmScore:
    """A text under one arm: token by token, KL(plain || arm) in nats, and exp(-mean log-probability)."""

    arm: str
    tokens: tuple[TokenComparison, ...]
    kl_mean: float | None
    kl_p95: float | None
    perplexity: float
    receipts: tuple[Receipt, ...]


@dataclass(frozen=True)
class TextScore:
    """A text that was read under several arms, the plain one first."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    arms: tuple[ArmScore, ...]
    timings: Timings


ScoreEvent = ArmEvent | TextScore


@dataclass(frozen=True)
class ModelInfo:
    """The model being served. Filled by the engine when it starts."""

    model: str
    architecture: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    engine: str
    dtype: str
    device: str
    attention: str
    """What computes it: transformers' name of it, or of vLLM's backends."""


@dataclass(frozen=True)
class RequestLimits:
    """How much a request may hold. Filled by ``rpc.admission``, for one model and one configuration."""

    max_prompt_bytes: int
    """Of a text, or of the messages of a chat together."""
    max_chat_messages: int
    max_operators: int
    """Of one text."""
    max_words: int
    """For one lens."""
    max_stops: int
    """Stop strings, and as many ids."""
    max_stop_characters: int
    max_arm_name_characters: int
    max_messages: int
    """Turns of a chat, arms, operators, positions and words together."""
    max_request_bytes: int
    max_tokens: int | None = None
    """Of one text. None: no cap of this server's."""
    max_total_tokens: int | None = None
    """Of all texts of a comparison together."""
    max_time: float | None = None
    """Seconds; also the limit of a request that sets none."""


@dataclass(frozen=True)
class Tokenization:
    """A prompt as it reaches the model: token ids and their texts, one for one."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
