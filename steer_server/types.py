"""The nouns that pass between rooms. All frozen; validated where they are made.

Who fills what: ``rpc.codec`` makes requests; ``generate`` turns operators into a :class:`SteeringPlan` and a request
into a :class:`DecodeJob`; the engine answers with :data:`EngineEvent`; ``generate`` and ``compare`` gather those into
:class:`Completion` and :class:`Comparison`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from enum import StrEnum

from operators.core.apply import Setting
from operators.core.artifact import OperatorArtifact
from operators.core.header import Rule
from steer_server.errors import InvalidRequestError

DEFAULT_MAX_TOKENS = 128
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
MAX_OPERATORS = 16
NORMAL = "normal"
"""Name of the plain arm of a comparison."""


class FinishReason(StrEnum):
    """Why a text ended."""

    EOS = "EOS"
    STOP_STRING = "STOP_STRING"
    STOP_TOKEN = "STOP_TOKEN"  # noqa: S105 - a finish reason, no secret
    MAX_TOKENS = "MAX_TOKENS"
    CONTEXT_LIMIT = "CONTEXT_LIMIT"
    TIME_LIMIT = "TIME_LIMIT"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """Exactly one of a text, token ids (used as they are) or a conversation."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    chat: tuple[ChatMessage, ...] | None = None

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.text, self.token_ids, self.chat)) != 1:
            raise InvalidRequestError("prompt", "is missing; exactly one of text, token_ids and chat is accepted")
        if self.text == "":
            raise InvalidRequestError("prompt.text", "is empty; at least one token is needed")
        if self.token_ids == ():
            raise InvalidRequestError("prompt.token_ids", "is empty; at least one token is needed")
        if self.chat == ():
            raise InvalidRequestError("prompt.chat", "is empty; at least one message is needed")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Defaults are those of the contract."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    time_limit: float | None = None
    """Seconds, waiting included."""

    def __post_init__(self) -> None:
        # Comparisons are written so that NaN fails them.
        _require(
            "temperature",
            self.temperature,
            0.0 <= self.temperature < math.inf,
            "a finite number of 0 or more",
        )
        _require("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "a number above 0, at most 1")
        _require("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _require("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "a number from 0 to 1")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, 0.01 <= penalty <= 100.0, "a number from 0.01 to 100")
        _require("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more")
        sizes = [len(stop) for stop in self.stop_strings]
        fit = len(sizes) <= MAX_STOPS and all(1 <= size <= MAX_STOP_CHARACTERS for size in sizes)
        _require("stop_strings", f"{len(sizes)} strings of {sizes[:4]} characters", fit, _STOPS)
        _require("stop_token_ids", f"{len(self.stop_token_ids)} ids", len(self.stop_token_ids) <= MAX_STOPS, _STOPS)
        if self.logprobs is not None:
            _require("logprobs", self.logprobs, 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        if self.time_limit is not None:
            _require("time_limit", self.time_limit, self.time_limit > 0, "a duration above 0")


_STOPS = f"at most {MAX_STOPS}, of 1 to {MAX_STOP_CHARACTERS} characters"


def _require(name: str, value: object, holds: bool, accepted: str) -> None:
    if not holds:
        raise InvalidRequestError(f"sampling.{name}", f"is {value}; accepted: {accepted}")


@dataclass(frozen=True)
class OperatorUse:
    """An operator as a request names it; None takes the operator's recommended value."""

    name: str
    strength: float | None = None
    rule: Rule | None = None
    blend: float | None = None


@dataclass(frozen=True)
class Arm:
    """One steered arm of a comparison."""

    name: str
    operators: tuple[OperatorUse, ...]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, one continuation."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    operators: tuple[OperatorUse, ...] = ()


@dataclass(frozen=True)
class CompareRequest:
    """One prompt, a plain continuation and one per arm."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    arms: tuple[Arm, ...]
    score: bool = True

    def __post_init__(self) -> None:
        if not self.arms:
            raise InvalidRequestError("arms", "is empty; at least one steered arm is needed")
        names = [arm.name for arm in self.arms]
        for index, arm in enumerate(self.arms):
            if not arm.name or arm.name == NORMAL or names.count(arm.name) > 1:
                raise InvalidRequestError(
                    f"arms[{index}].name",
                    f"is {arm.name!r}; a name of its own is needed, other than {NORMAL!r}",
                )
            if not arm.operators:
                raise InvalidRequestError(f"arms[{index}].operators", "is empty; the plain arm runs anyway")


@dataclass(frozen=True, eq=False)
class Application:
    """One operator, at one setting, of one request. Holds the very version that the request started with."""

    name: str
    artifact: OperatorArtifact
    setting: Setting
    defaulted: tuple[str, ...]
    """Which of strength, rule and blend the artifact recommended."""
    calibrated: bool = False
    """Whether the setting is the recommended one, and the artifact holds what a calibration measured there."""

    @property
    def layer(self) -> int:
        """The decoder layer whose input is pushed."""
        return self.artifact.header.injection_layer


@dataclass(frozen=True, eq=False)
class SteeringPlan:
    """What is added to the layer inputs of one row; never empty."""

    applications: tuple[Application, ...]

    def dose_bound(self, layer: int) -> float:
        """Sum of |lambda|/2 over the operators at ``layer``: what the dose there cannot pass, but for rounding."""
        return sum(abs(use.setting.strength) / 2.0 for use in self.applications if use.layer == layer)


@dataclass(frozen=True, eq=False)
class Row:
    """One continuation of a job. ``score`` asks for KL and log-probabilities under the plain model."""

    plan: SteeringPlan | None = None
    score: bool = False


@dataclass(frozen=True, eq=False)
class DecodeJob:
    """One prompt and the rows that continue it in one batch."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class TopLogprob:
    """One alternative at a position."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token under the row's own model, before temperature and truncation; in nats."""

    token_id: int
    token: str
    logprob: float
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True)
class Score:
    """One position of a text under the plain model: KL(plain || row) and log p_plain(token), in nats."""

    kl: float
    plain_logprob: float


@dataclass(frozen=True)
class Receipt:
    """What one operator did to one row, measured on the hidden states. Filled by the engine."""

    operator: str
    digest: str
    layer: int
    rule: Rule
    strength: float
    blend: float
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
    at: float = field(default_factory=time.monotonic, compare=False)


EngineEvent = Admitted | TokenEvent | RowFinished


@dataclass(frozen=True)
class Timings:
    """Seconds from entering the queue."""

    queued: float
    time_to_first_token: float
    total: float


@dataclass(frozen=True)
class Completion:
    """A finished continuation."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    reason: FinishReason
    stop_string: str
    prompt_tokens: int
    timings: Timings
    receipts: tuple[Receipt, ...]
    logprobs: tuple[TokenLogprob, ...]
    scores: tuple[Score, ...]
    seed: int


@dataclass(frozen=True)
class Started:
    """The prompt as the model gets it. First event of every stream."""

    request_id: str
    prompt_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Delta:
    """New text; may be empty."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


GenerateEvent = Started | Delta | Completion


@dataclass(frozen=True)
class ArmEvent:
    """One event of one arm."""

    arm: str
    event: GenerateEvent


@dataclass(frozen=True)
class Comparison:
    """One steered arm held against the plain one. KL in nats; None and empty where not scored."""

    arm: str
    first_divergence: int | None
    kl_per_token: tuple[float, ...]
    kl_mean: float | None
    kl_p95: float | None
    normal_perplexity: float | None
    steered_perplexity: float | None


@dataclass(frozen=True)
class Compared:
    """Last event of a comparison: one entry per steered arm."""

    comparisons: tuple[Comparison, ...]


CompareEvent = ArmEvent | Compared


@dataclass(frozen=True)
class ModelInfo:
    """The model being served. Filled by the engine when it starts."""

    model: str
    architecture: str
    fingerprint: str
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
