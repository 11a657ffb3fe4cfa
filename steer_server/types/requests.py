"""What a caller asks for. ``rpc.codec`` makes each from its message; a value that is not accepted is refused here."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import Annotated

from operators.core.header import Anchor, FirstToken, Rule
from operators.core.positions import Positions
from operators.core.vector_source import MAX_LENS_WORD, MAX_LENS_WORDS
from steer_server.errors import InvalidRequestError
from steer_server.types.limits import Bounded, Digest, NotEmpty, Range, check_fields, check_unique

DEFAULT_MAX_TOKENS = 128
MAX_LOGPROBS = 20
MAX_OPERATORS = 16
MAX_ARM_NAME = 128
MAX_REQUEST_ID = 128
MAX_PROMPT_ID = 128
MAX_PROMPTS = 256
MAX_STOPS = 64
"""Strings, and as many ids."""
MAX_STOP_CHARACTERS = 1024
MAX_BIASES = 300
MAX_OPTIONS = 16
"""Of a chat template."""
MAX_OPTION_NAME = 64
MAX_OPTION_TEXT = 1024
MAX_REPORT_WORDS = 32
NORMAL = "normal"
"""Name of the plain arm of a comparison."""


def _draw_request_id() -> str:
    return secrets.token_hex(8)


def _draw_seed() -> int:
    # A number that every reader of JSON keeps: many hold whole numbers as doubles.
    return secrets.randbits(53)


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class TemplateOption:
    """What a chat template is told beside the messages: one of a flag, a text and a number."""

    name: Annotated[str, NotEmpty("a name is needed"), Bounded(max_characters=MAX_OPTION_NAME)]
    boolean: bool | None = None
    text: Annotated[str | None, Bounded(max_characters=MAX_OPTION_TEXT)] = None
    number: Annotated[float | None, Range(accepted="a finite number")] = None

    @property
    def value(self) -> bool | str | float | None:
        """As the template has it; a whole number is an integer."""
        if self.number is not None:
            return int(self.number) if self.number.is_integer() else self.number
        return self.text if self.boolean is None else self.boolean

    def check_ties(self, path: str) -> None:
        """See :class:`~steer_server.types.limits.Tied`."""
        if self.value is None:
            raise InvalidRequestError(path, "has no value; exactly one of boolean, text and number is accepted")


@dataclass(frozen=True)
class Chat:
    """A conversation, as the model's chat template renders it."""

    messages: Annotated[tuple[ChatMessage, ...], NotEmpty("at least one message is needed")]
    continue_final_message: bool = False
    """The text goes on with the last turn, which is the assistant's."""
    template_options: Annotated[tuple[TemplateOption, ...], Bounded(max_items=MAX_OPTIONS, items="options")] = ()

    def check_ties(self, path: str) -> None:
        """See :class:`~steer_server.types.limits.Tied`."""
        check_unique((option.name for option in self.template_options), f"{path}.template_options", "name")
        role = self.messages[-1].role
        if self.continue_final_message and role != "assistant":
            problem = f"is set, and the last turn is of {role[:80]!r}; one of 'assistant' is accepted"
            raise InvalidRequestError(f"{path}.continue_final_message", problem)


@dataclass(frozen=True)
class Prompt:
    """Exactly one of a text, token ids (used as they are) or a conversation."""

    text: Annotated[str | None, NotEmpty("at least one token is needed")] = None
    token_ids: Annotated[tuple[int, ...] | None, NotEmpty("at least one token is needed")] = None
    chat: Chat | None = None

    def check_ties(self, path: str) -> None:
        """See :class:`~steer_server.types.limits.Tied`."""
        if sum(part is not None for part in (self.text, self.token_ids, self.chat)) != 1:
            raise InvalidRequestError(path, "is missing; exactly one of text, token_ids and chat is accepted")


@dataclass(frozen=True)
class TokenBias:
    """What is added to the logit of one token."""

    token_id: int
    bias: Annotated[float, Range(-100.0, 100.0)]


@dataclass(frozen=True)
class ArmSampling:
    """How the tokens of one arm are chosen. Defaults are those of the contract."""

    temperature: Annotated[float, Range(0.0)] = 0.0
    top_p: Annotated[float, Range(above=0.0, maximum=1.0)] = 1.0
    top_k: Annotated[int, Range(0, accepted="0 (off) or more")] = 0
    min_p: Annotated[float, Range(0.0, 1.0)] = 0.0
    repetition_penalty: Annotated[float, Range(0.01, 100.0)] = 1.0
    seed: int | None = None
    """None: that of the request, so that arms draw the same numbers."""
    max_tokens: Annotated[int, Range(1)] = DEFAULT_MAX_TOKENS
    stop_strings: Annotated[
        tuple[str, ...],
        Bounded(max_items=MAX_STOPS, min_characters=1, max_characters=MAX_STOP_CHARACTERS, items="strings"),
    ] = ()
    stop_token_ids: Annotated[tuple[int, ...], Bounded(max_items=MAX_STOPS, items="ids")] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int | None, Range(0, MAX_LOGPROBS)] = None
    time_limit: Annotated[float | None, Range(above=0.0, accepted="a duration above 0")] = None
    """Seconds, waiting included."""
    presence_penalty: Annotated[float, Range(-2.0, 2.0)] = 0.0
    frequency_penalty: Annotated[float, Range(-2.0, 2.0)] = 0.0
    """Both of generated tokens alone; the prompt's do not count."""
    logit_bias: Annotated[tuple[TokenBias, ...], Bounded(max_items=MAX_BIASES, items="biases")] = ()
    min_tokens: Annotated[int, Range(0)] = 0
    """Before so many, neither a token nor a stop string ends the text."""
    skip_special_tokens: bool = True
    fit_max_tokens: bool = False
    """Whether ``max_tokens`` is lowered to what there is room for, in place of refusing."""

    def check_ties(self, path: str) -> None:
        """See :class:`~steer_server.types.limits.Tied`."""
        check_unique((bias.token_id for bias in self.logit_bias), f"{path}.logit_bias", "token_id")
        if self.min_tokens > self.max_tokens:
            problem = f"is {self.min_tokens}; accepted: 0 to {self.max_tokens}, which is max_tokens"
            raise InvalidRequestError(f"{path}.min_tokens", problem)

    def within(self, whole: SamplingParams) -> SamplingParams:
        """As they are used in a request whose own are ``whole``."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return SamplingParams(**own | {"seed": whole.seed if self.seed is None else self.seed})


@dataclass(frozen=True)
class SamplingParams(ArmSampling):
    """How the tokens of a request's texts are chosen, or those of one text."""

    # Drawn where a request names none, so that the response can report what was used.
    seed: int = field(default=0, metadata={"when_unset": _draw_seed})

    def __post_init__(self) -> None:
        check_fields(self, "sampling")

    def of_sample(self, number: int) -> SamplingParams:
        """Those of one of several samples of a text: each has a seed of its own."""
        return replace(self, seed=(self.seed + number) % 2**64) if number else self


@dataclass(frozen=True)
class WeightedWord:
    """A word that a lens is asked for, and its weight among the others'; negative pushes away from it."""

    text: Annotated[str, NotEmpty("a word is needed"), Bounded(max_characters=MAX_LENS_WORD)]
    weight: Annotated[float, Range(accepted="a finite number other than 0")] = 1.0


@dataclass(frozen=True)
class OperatorUse:
    """An operator as a request names it; None takes the operator's recommended value."""

    name: str
    strength: float | None = None
    rule: Rule | None = None
    blend: float | None = None
    positions: Positions | None = None
    anchor: Anchor | None = None
    first_token: FirstToken | None = None
    words: Annotated[tuple[WeightedWord, ...], Bounded(max_items=MAX_LENS_WORDS, items="words")] = ()
    """Of a lens, and of nothing else."""
    kl: Annotated[float | None, Range(above=0.0)] = None
    """In place of a strength: the p95 KL in nats that it is to have by the operator's dose curve."""
    digest: Annotated[str | None, Digest()] = None
    """The version that is meant, of the operator or of the lens; None takes the one that is served."""


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison beside the plain one: steered, or sampled otherwise, or both."""

    name: Annotated[str, Bounded(max_characters=MAX_ARM_NAME)]
    operators: tuple[OperatorUse, ...]
    sampling: ArmSampling | None = None
    """In place of the request's; None: that one."""

    def check_ties(self, path: str) -> None:
        """See :class:`~steer_server.types.limits.Tied`."""
        if not self.operators and self.sampling is None:
            raise InvalidRequestError(
                f"{path}.operators", "is empty; an arm without operators needs a sampling of its own"
            )
        if self.sampling is not None and self.sampling.time_limit is not None:
            raise InvalidRequestError(
                f"{path}.sampling.time_limit", "is set; that of the request is accepted, which bounds all arms"
            )


@dataclass(frozen=True)
class TokenReport:
    """What is said of every token of a text, beside its log-probabilities."""

    top: Annotated[int, Range(0, MAX_LOGPROBS)] = 0
    """Tokens that are among so many likeliest ones under the arm alone, or under the plain model alone."""
    words: Annotated[
        tuple[str, ...],
        Bounded(max_items=MAX_REPORT_WORDS, min_characters=1, max_characters=MAX_LENS_WORD, items="words"),
    ] = ()
    """Whose probability is reported."""
    doses: bool = False


_RequestId = Annotated[str, Bounded(max_characters=MAX_REQUEST_ID)]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, one continuation."""

    request_id: _RequestId = field(metadata={"when_unset": _draw_request_id})
    prompt: Prompt
    sampling: SamplingParams
    operators: tuple[OperatorUse, ...] = ()
    n: Annotated[int, Range(1)] = 1
    """Samples."""
    repeat_in_finished: bool = True
    """Whether the end of a stream repeats what its deltas had."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class NamedPrompt:
    """One of several prompts of a request."""

    id: Annotated[str, Bounded(max_characters=MAX_PROMPT_ID)]
    prompt: Prompt
    seed: int | None = None
    """None: that of the request."""


@dataclass(frozen=True)
class CompareRequest:
    """One prompt or several; of each a plain continuation and one per arm; of each continuation ``n`` samples."""

    request_id: _RequestId = field(metadata={"when_unset": _draw_request_id})
    prompt: Prompt | None
    sampling: SamplingParams
    arms: tuple[Arm, ...]
    score: bool = True
    n: Annotated[int, Range(1)] = 1
    normal: bool = True
    """Whether the plain arm runs."""
    report: TokenReport | None = None
    prompts: Annotated[tuple[NamedPrompt, ...], Bounded(max_items=MAX_PROMPTS, items="prompts")] = ()
    """In place of ``prompt``."""
    repeat_in_finished: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.prompt is None) != bool(self.prompts):
            found = "is missing" if self.prompt is None else "is there beside prompts"
            raise InvalidRequestError("prompt", f"{found}; either one prompt or a list of prompts is accepted")
        ids = Counter(each.id for each in self.prompts)
        for index, each in enumerate(self.prompts):
            if not each.id or ids[each.id] > 1:
                raise InvalidRequestError(f"prompts[{index}].id", f"is {each.id!r}; an id of its own is needed")
        if not self.arms and not self.normal:
            raise InvalidRequestError("arms", "is empty; without the plain arm (`normal`) at least one is needed")
        _check_names(self.arms)
        if self.report is not None and not self.score:
            raise InvalidRequestError("report", "is set and `score` is not; a report is made of scores")


@dataclass(frozen=True)
class ScoreRequest:
    """A text that the plain model reads, and every arm. Without a prompt, its first token is the prompt."""

    request_id: _RequestId = field(metadata={"when_unset": _draw_request_id})
    prompt: Prompt | None = None
    text: Annotated[str | None, NotEmpty("at least one token is needed")] = None
    token_ids: Annotated[tuple[int, ...] | None, NotEmpty("at least one token is needed")] = None
    """Of the text, used as they are. Exactly one of the two is given."""
    arms: tuple[Arm, ...] = ()
    report: TokenReport | None = None
    time_limit: Annotated[float | None, Range(above=0.0, accepted="a duration above 0")] = None
    """Seconds, waiting included."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            both = "and token_ids are both there" if self.text is not None else "is missing"
            raise InvalidRequestError("text", f"{both}; exactly one of text and token_ids is accepted")
        for index, arm in enumerate(self.arms):
            if not arm.operators:
                raise InvalidRequestError(f"arms[{index}].operators", "is empty; the plain model reads the text anyway")
            if arm.sampling is not None:
                raise InvalidRequestError(f"arms[{index}].sampling", "is set; nothing is decoded where a text is given")
        check_fields(self)
        _check_names(self.arms)

    @property
    def text_field(self) -> str:
        """Which of the two it is."""
        return "text" if self.text is not None else "token_ids"


def _check_names(arms: tuple[Arm, ...]) -> None:
    counts = Counter(arm.name for arm in arms)
    for index, arm in enumerate(arms):
        if not arm.name or arm.name == NORMAL or counts[arm.name] > 1:
            raise InvalidRequestError(
                f"arms[{index}].name", f"is {arm.name!r}; a name of its own is needed, other than {NORMAL!r}"
            )


@dataclass(frozen=True)
class TokenizeRequest:
    """A prompt whose token ids the caller wants to see."""

    prompt: Prompt

    def __post_init__(self) -> None:
        check_fields(self)
