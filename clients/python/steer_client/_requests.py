"""What a caller asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, get_args

from steer_client._numbers import read_decimal
from steer_client._positions import Positions

#: How an operator's running direction is made from its Jacobian blocks.
Rule: TypeAlias = Literal["cumulative", "substitute"]
#: What a blend blends with: what the concept adds to neutral texts, or its hidden state itself.
Anchor: TypeAlias = Literal["contrast", "concept"]
#: What is added to a text's first token: as everywhere, or the anchor alone.
FirstToken: TypeAlias = Literal["operator", "anchor"]

#: The name of the lens that a word is given to where a request names none.
LENS: Final = "lens"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat. `role` is one of the model's template, mostly "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A prompt that the server renders with the model's own chat template."""

    messages: Sequence[ChatMessage]
    #: The text goes on with the last message, which must be the assistant's.
    continue_final_message: bool = False
    #: What the template is told beside the messages, such as {"enable_thinking": False}. One that it does not use is
    #: an error.
    template_options: Mapping[str, bool | str | float] = field(default_factory=dict)


#: Text, token ids (used as they are), or a chat.
Prompt: TypeAlias = str | Sequence[int] | Chat | Sequence[ChatMessage]
#: Several prompts: by an id of the caller's own for each, or in order, with "0", "1", and so on for ids.
Prompts: TypeAlias = Mapping[str, Prompt] | Sequence[Prompt]


@dataclass(frozen=True, slots=True)
class WeightedWord:
    """A word that a lens pushes towards, and its weight among the others of one use; negative pushes away from it."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class OperatorUse:
    """One operator applied to one request. What is None takes the operator's recommended value.

    `strength` is λ: the push is λ/2 times the norm of the hidden state; 0 changes nothing, a negative
    value pushes away. `blend` is β in [0, 1]: 0 is the operator's direction, 1 its `anchor`. `positions` are those
    that it pushes; `first_token` "anchor" puts the anchor at the first one of the text, whatever the blend. `kl`, in
    place of a strength, is a dose in nats: the server takes the strength at which the 95th percentile over the tokens
    of KL(plain ‖ steered) was that when the operator was measured. `words` are for a lens alone: see `Word` and
    `Words`. `digest` pins the version of the operator, or of the lens: a server that has another one refuses.
    """

    name: str
    strength: float | None = None
    rule: Rule | None = None
    blend: float | None = None
    positions: Positions | None = None
    anchor: Anchor | None = None
    first_token: FirstToken | None = None
    words: Sequence[WeightedWord] = ()
    kl: float | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str, *, rule: Rule | None = None, kl: float | None = None) -> OperatorUse:
        """Reads `NAME`, `NAME=λ` or `NAME=λ@β`, and behind it `:POSITIONS`, as `Positions.parse` reads them.

        Then follow, in any order, `,anchor=contrast` or `,anchor=concept`, `,first_token=operator` or
        `,first_token=anchor`, and `,digest=sha256:` with the 64 digits of the version that is meant.

        `kl` is for an operator without λ. Raises ValueError, naming the text and the accepted form, for anything else.
        """
        head, *choices = text.split(",")
        setting, has_positions, positions = head.partition(":")
        where = Positions.parse(positions) if has_positions else None
        name, has_strength, values = setting.partition("=")
        strength, has_blend, blend = values.partition("@")
        try:
            if not name or name != name.strip() or "@" in name:
                raise ValueError(name)
            return cls(
                name=name,
                strength=read_decimal(strength) if has_strength else None,
                rule=rule,
                blend=read_decimal(blend) if has_blend else None,
                positions=where,
                **_read_choices(choices),
                kl=None if has_strength else kl,
            )
        except ValueError:
            raise ValueError(
                f"cannot read the operator {text!r}: write NAME, NAME=λ or NAME=λ@β, for example golden-gate=0.4@0.5, "
                "and :POSITIONS behind it, for example golden-gate=0.4:first, then ,anchor=contrast|concept, "
                ",first_token=operator|anchor and ,digest=sha256:DIGITS"
            ) from None


_CHOICES: Final = {"anchor": get_args(Anchor), "first_token": get_args(FirstToken)}


def _read_choices(texts: Sequence[str]) -> dict[str, Any]:
    """Reads `anchor=contrast` and the like. Raises ValueError for anything else, and for a name that comes twice."""
    found: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        # Of a digest, the server says what is wrong.
        if name in found or not (value if name == "digest" else value in _CHOICES.get(name, ())):
            raise ValueError(text)
        found[name] = value
    return found


@dataclass(frozen=True, slots=True)
class TokenBias:
    """What is added to the logit of one token, -100 to 100."""

    token_id: int
    bias: float


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. What is None or empty is not sent: the server's default applies.

    The server judges the values; the defaults below are the server's.
    """

    #: 0 is greedy. Default 0.
    temperature: float | None = None
    #: In (0, 1]. Default 1 (off).
    top_p: float | None = None
    #: 0 is off. Default 0.
    top_k: int | None = None
    #: In [0, 1]. Default 0 (off).
    min_p: float | None = None
    #: Positive; 1 is off. Default 1.
    repetition_penalty: float | None = None
    #: Default: drawn by the server and reported in the result.
    seed: int | None = None
    #: At least 1. Default 128, or as many fewer as the server has room for.
    max_tokens: int | None = None
    #: A special token such as "<|im_end|>" is one too, alone; with other text beside it, it is refused.
    stop_strings: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    #: Decode through end-of-sequence tokens. Default False.
    ignore_eos: bool | None = None
    #: Alternatives to report beside each token's own log-probability (0 to 20). None: no log-probabilities.
    logprobs: int | None = None
    #: Seconds, waiting included, after which the text so far is returned. Default: none.
    time_limit: float | None = None
    #: -2 to 2, taken from the logits of tokens generated before; the prompt does not count. Default 0 (off).
    presence_penalty: float | None = None
    #: -2 to 2, taken from a token's logit once for each time that it was generated. Default 0 (off).
    frequency_penalty: float | None = None
    #: By token id, what is added to its logit: -100 to 100, of at most 300 tokens.
    logit_bias: Mapping[int, float] | Sequence[TokenBias] = ()
    #: Before so many tokens neither a token nor a stop string ends the text. Default 0 (off).
    min_tokens: int | None = None
    #: False leaves special tokens in the text, the one that ended it too. Default True.
    skip_special_tokens: bool | None = None
    #: Take fewer than `max_tokens` where the server has no room for more, in place of an error. Default: whether
    #: `max_tokens` is None.
    fit_max_tokens: bool | None = None


#: Every choice left to the server.
SERVER_DEFAULTS = SamplingParams()

#: What steers a text: uses of operators, each as an object or as `OperatorUse.parse` reads it ("ocean=0.4@0.5:first"),
#: one alone or several; or names with their strengths ({"ocean": 0.4}; None takes the recommended one).
Operators: TypeAlias = str | OperatorUse | Sequence[str | OperatorUse] | Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm of a comparison: operators, and where it is not sampled as the others are, how.

    `sampling` takes the place of the comparison's as a whole, but for the seed, which is the comparison's where it sets
    none, and for the time limit, which is the comparison's always. With a sampling of its own an arm needs no operator.
    """

    operators: Operators = ()
    sampling: SamplingParams | None = None


@dataclass(frozen=True, slots=True)
class TokenReport:
    """What to report of every token of a text, beside its log-probabilities and KL.

    `top` (0 to 20): which tokens an arm has among its likeliest ones and the plain model has not, and the reverse.
    `words` (at most 32): the probability that the text goes on with each. `doses`: |change|/|hidden state| of every
    position, at the lowest layer that the arm pushes.
    """

    top: int = 0
    words: Sequence[str] = ()
    doses: bool = False


# What is sent, by the fields of the contract's messages of the same names.


@dataclass(frozen=True, slots=True)
class TemplateOption:
    """An option of a chat template: one of its values is set."""

    name: str
    boolean: bool | None = None
    text: str | None = None
    number: float | None = None


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A chat as the contract's message has it."""

    messages: Sequence[ChatMessage]
    continue_final_message: bool
    template_options: Sequence[TemplateOption]


@dataclass(frozen=True, slots=True)
class PromptInput:
    """A prompt as the contract's message has it: one of the three is set."""

    text: str | None = None
    token_ids: Sequence[int] | None = None
    chat: ChatInput | None = None


@dataclass(frozen=True, slots=True)
class NamedArm:
    """One arm of a comparison as the contract's message has it."""

    name: str
    operators: Sequence[OperatorUse]
    sampling: SamplingParams | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt, one continuation or several."""

    request_id: str
    prompt: PromptInput
    sampling: SamplingParams
    operators: Sequence[OperatorUse]
    n: int | None = None
    repeat_in_finished: bool | None = None


@dataclass(frozen=True, slots=True)
class NamedPrompt:
    """One of several prompts of a request."""

    id: str
    prompt: PromptInput
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class CompareRequest:
    """One prompt or several; of each a plain continuation and one per arm."""

    request_id: str
    prompt: PromptInput | None
    sampling: SamplingParams
    arms: Sequence[NamedArm]
    score: bool
    n: int | None = None
    normal: bool | None = None
    prompts: Sequence[NamedPrompt] = ()
    repeat_in_finished: bool | None = None
    report: TokenReport | None = None


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A text, as itself or as token ids, that the plain model and every arm read."""

    request_id: str
    prompt: PromptInput | None
    text: str | None
    token_ids: Sequence[int] | None
    arms: Sequence[NamedArm]
    report: TokenReport | None
    time_limit: float | None


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A prompt whose token ids are asked for."""

    prompt: PromptInput


@dataclass(frozen=True, slots=True)
class GetOperatorRequest:
    """The name of an operator that is asked for."""

    name: str
