"""What a server answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from steer_client._diff import Change, word_diff
from steer_client._html import cell, diffed, escape, table
from steer_client._positions import ALL_POSITIONS, Positions
from steer_client._requests import Anchor, FirstToken, Rule


class FinishReason(StrEnum):
    """Why a text ended."""

    EOS = "EOS"
    STOP_STRING = "STOP_STRING"
    STOP_TOKEN = "STOP_TOKEN"
    MAX_TOKENS = "MAX_TOKENS"
    CONTEXT_LIMIT = "CONTEXT_LIMIT"
    TIME_LIMIT = "TIME_LIMIT"
    #: The server stopped the request, for example while shutting down.
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and produced; `completion_tokens` includes the token that ended the text."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from entering the queue: until decoding began, until the first token, until the end."""

    queued: float
    #: None when no token was produced.
    time_to_first_token: float | None
    total: float


@dataclass(frozen=True, slots=True)
class SteeredWord:
    """A word as a lens read it; its direction was made of the unembedding's rows of `token_ids`."""

    text: str
    weight: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof, measured on the hidden states, that one operator was applied.

    With a strength other than 0, `prompt_tokens_steered` and `prompt_tokens_cached` add up to the tokens of the prompt
    that are among `positions`.
    """

    operator: str
    #: sha256 of the artifact's content, "sha256:<64 hex digits>".
    digest: str
    #: The decoder layer whose input was pushed.
    layer: int
    rule: Rule
    strength: float
    blend: float
    #: Of `positions`, those whose hidden state was changed in this request. The last generated token is never fed back.
    prompt_tokens_steered: int
    generated_tokens_steered: int
    #: Of `positions`, those whose keys and values an earlier request with the very same steering left in the server's
    #: prefix cache: not computed again, so measured for that request and not for this one. Always 0 on the engine "hf".
    prompt_tokens_cached: int
    #: Norm of the change over the norm of the hidden state at this layer, after rounding, over the tokens steered here:
    #: half of the strength that was measured, which `mean_strength` and `max_strength` are.
    mean_dose: float
    max_dose: float
    #: Sum of |strength|/2 over the request's operators at this layer, wherever they push: what its dose cannot pass,
    #: but for rounding. Of one operator, what its dose is.
    dose_bound: float
    #: Which of "strength", "rule", "blend", "positions", "anchor" and "first_token" came from the operator's
    #: recommendation.
    defaulted: tuple[str, ...]
    #: The setting is the recommended one, and the operator holds the measurements of a calibration there.
    calibrated: bool
    #: Where the operator was to push.
    positions: Positions = ALL_POSITIONS
    anchor: Anchor = field(default="concept", metadata={"when_unset": lambda: "concept"})
    first_token: FirstToken = field(default="operator", metadata={"when_unset": lambda: "operator"})
    #: Of a lens, the words that its direction was made of; `digest` is then that of the direction.
    words: tuple[SteeredWord, ...] = ()
    #: Of a lens, the sha256 of its own content; None for every other operator.
    lens_digest: str | None = None
    #: The p95 KL in nats that `strength` was read off the operator's dose curve for; None where it was not. Compare
    #: measures what it came to: `ArmResult.kl`.
    kl: float | None = None
    #: At how many of the steered positions the server held what was added against the operators' direction, worked out
    #: once more from the token ids, and the smallest cosine found there; None where no position was checked.
    positions_checked: int = 0
    worst_cosine: float | None = None

    @property
    def mean_strength(self) -> float:
        """What was measured in the unit of `strength`: twice the mean dose."""
        return 2 * self.mean_dose

    @property
    def max_strength(self) -> float:
        """The largest that was measured, in the unit of `strength`."""
        return 2 * self.max_dose


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at a position; `logprob` is a natural logarithm."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model's own distribution, and the likeliest alternatives."""

    token_id: int
    token: str
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished text."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    #: The stop string that ended the text; None when none did.
    stop_string: str | None
    usage: Usage
    timings: Timings
    #: One per operator of the request, in its order.
    receipts: tuple[Receipt, ...]
    #: Empty unless `SamplingParams.logprobs` was set.
    logprobs: tuple[TokenLogprob, ...]
    #: The seed that was used.
    seed: int
    #: Which of several samples it is, from 0.
    sample: int = 0

    def diff(self, other: Generation) -> tuple[Change, ...]:
        """How this text differs from another, word by word: `plain.diff(steered)` has what steering added."""
        return word_diff(self.text, other.text)

    def _repr_html_(self) -> str:
        steered = ", ".join(f"{each.operator} λ = {each.strength:g}" for each in self.receipts) or "plain"
        note = f"{steered} · {self.finish_reason} · {self.usage.completion_tokens} tokens · seed {self.seed}"
        return cell(table([("", "text")], [[escape(self.text)]]), f'<div class="note">{escape(note)}</div>')


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of a text. `text` may be empty: a token can hold part of a character."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ArmDelta:
    """The next piece of one arm's text; the plain arm is named "normal"."""

    arm: str
    delta: TextDelta
    #: Which of the arm's texts, from 0.
    sample: int = 0
    #: Of several prompts, which.
    prompt_id: str = ""


@dataclass(frozen=True, slots=True)
class KL:
    """KL(plain ‖ steered) in nats over the positions of a steered text."""

    mean: float
    #: None when the server did not report it.
    p95: float | None
    per_token: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class WordMass:
    """The probability that a text goes on with a word, under the plain model and under an arm."""

    word: str
    normal: float
    arm: float


@dataclass(frozen=True, slots=True)
class TokenComparison:
    """A token of a text under an arm and under the plain model; log-probabilities are natural logarithms."""

    token_id: int
    token: str
    logprob: float
    normal_logprob: float
    #: KL(plain ‖ arm) in nats, of the distributions that the token was chosen from.
    kl: float
    #: Tokens that the arm has among its likeliest and the plain model has not, with the arm's log-probabilities; and
    #: those of the plain model that the arm has not, with the plain model's.
    gained: tuple[TopLogprob, ...] = ()
    lost: tuple[TopLogprob, ...] = ()
    words: tuple[WordMass, ...] = ()
    #: Of the position that is fed this token; None where none was asked for, at the last token, and where no layer is
    #: pushed.
    dose: float | None = None


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm held against the normal one. What was not scored is None, and without the normal arm what needs it."""

    generation: Generation
    #: Index of the first differing token; None when the token ids are the same.
    first_divergence: int | None
    kl: KL | None
    #: Perplexity of each text under the plain model.
    normal_perplexity: float | None
    steered_perplexity: float | None
    #: Where a `TokenReport` was asked for: one per token of the text.
    tokens: tuple[TokenComparison, ...] = ()


@dataclass(frozen=True, slots=True)
class ABResult:
    """The plain text and every steered one, by the name of its arm, in the request's order.

    Of several samples these are the first; `samples` has them all.
    """

    #: The plain text, or None where the plain arm was not asked for; `normal` is the same for those who know.
    plain: Generation | None
    #: Every arm but the plain one.
    steered: Mapping[str, ArmResult]
    #: The samples behind the first one, each as a result of its own.
    others: tuple[ABResult, ...] = ()

    @property
    def normal(self) -> Generation:
        """The plain text. Raises RuntimeError where the plain arm was not asked for."""
        if self.plain is None:
            raise RuntimeError("there is no plain text: the comparison was asked for with normal=False")
        return self.plain

    @property
    def samples(self) -> tuple[ABResult, ...]:
        """Each sample as a result of its own, this one first: as many as were asked for with `n`."""
        return (replace(self, others=()), *self.others)

    def _repr_html_(self) -> str:
        rows = [] if self.plain is None else [["normal", escape(self.plain.text), ""]]
        for name, arm in self.steered.items():
            text = arm.generation.text
            shown = escape(text) if self.plain is None else diffed(word_diff(self.plain.text, text))
            rows.append([escape(name), shown, "" if arm.kl is None else f"{arm.kl.mean:.2f}"])
        return cell(table([("arm", ""), ("text", "text"), ("KL mean", "number")], rows))


@dataclass(frozen=True, slots=True)
class PromptResult:
    """All of one prompt of several."""

    prompt_id: str
    result: ABResult


@dataclass(frozen=True, slots=True)
class ArmScore:
    """A text under one arm."""

    arm: str
    tokens: tuple[TokenComparison, ...]
    #: Of KL(plain ‖ arm) over the tokens; 0 for the plain model.
    kl_mean: float | None
    kl_p95: float | None
    #: exp(-mean log-probability) of the text under this arm.
    perplexity: float
    #: One per operator of the arm, in its order.
    receipts: tuple[Receipt, ...]


@dataclass(frozen=True, slots=True)
class TextScore:
    """A text under the plain model and under every arm."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    #: Of the text, without the prompt.
    token_ids: tuple[int, ...]
    #: The plain model's, named "normal", and then the request's in their order.
    arms: tuple[ArmScore, ...]
    timings: Timings

    @property
    def normal(self) -> ArmScore:
        """The text under the plain model."""
        return self.arms[0]

    @property
    def steered(self) -> Mapping[str, ArmScore]:
        """The text under every other arm, by its name."""
        return {each.arm: each for each in self.arms[1:]}


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A prompt as it reaches the model."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class RequestLimits:
    """How much a request may hold; more is refused before it is read."""

    #: UTF-8 bytes of a text, or of the messages of a chat together. What fits into the context is less, as a rule.
    max_prompt_bytes: int
    max_chat_messages: int
    #: Of one text.
    max_operators: int
    #: For one lens.
    max_words: int
    #: Stop strings, and as many stop tokens.
    max_stops: int
    max_stop_characters: int
    max_arm_name_characters: int
    #: Turns of a chat, arms, operators, positions and words together.
    max_messages: int
    #: Of the largest request.
    max_request_bytes: int
    #: Of one text; None: no cap of this server's.
    max_tokens: int | None = None
    #: Of all texts of a comparison together.
    max_total_tokens: int | None = None
    #: Seconds; also the limit of a request that sets none.
    max_time: float | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model, its limits and the engine that serves it."""

    model: str
    architecture: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    #: Prompt and completion together, in tokens.
    context_length: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    engine: str
    dtype: str
    device: str
    #: What computes attention: sdpa or eager on the engine hf, else vLLM's backends. Empty from an older server.
    attention: str
    server_version: str
    max_queue: int
    max_arms: int
    #: Most that |strength|/2 of a request's operators at one layer may add up to.
    max_dose: float
    #: Whether clients may change the server's operators. Not said by an older server.
    operator_admin: bool
    #: How much a request may hold. None from a server that does not say.
    limits: RequestLimits | None = None
