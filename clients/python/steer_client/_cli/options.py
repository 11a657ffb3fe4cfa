"""The commands' arguments and options, and the groups of options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

import steer_client
from steer_client._numbers import read_decimal, read_whole
from steer_client._requests import LENS

_STEERING = "Steering"
_SAMPLING = "Sampling"
_CONNECTION = "Connection and output"


class RuleChoice(StrEnum):
    """The rules, as choices of an option."""

    cumulative = "cumulative"
    substitute = "substitute"


# typer reads these annotations at run time.
PromptArgument = Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt.")]
OperatorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--operator",
        "-o",
        metavar="NAME[=λ[@β]][:POSITIONS][,anchor=contrast|concept][,first_token=operator|anchor][,digest=SHA256]",
        help="An operator, with its strength λ, its blend β, and where it pushes: all, first, prompt, generated, a "
        "range such as 4.. or 0..8, or one of a part such as generated:0..5. Then which anchor β blends with, and "
        "whether it stands alone at the first token. May be repeated; the operators add up.",
        rich_help_panel=_STEERING,
    ),
]
WordOption = Annotated[
    list[str] | None,
    typer.Option(
        "--word",
        "-w",
        metavar="WORD[*WEIGHT][, ...][=λ][:POSITIONS]",
        help='A word for the lens to push towards, such as coffee, coffee=0.12 or "hot air balloon"; several in one '
        'direction, each with its weight: "ocean, storm*-0.5=0.12". May be repeated; what they add adds up.',
        rich_help_panel=_STEERING,
    ),
]
LensOption = Annotated[
    str,
    typer.Option("--lens", metavar="NAME[,digest=SHA256]", help="The lens of the words.", rich_help_panel=_STEERING),
]
KLOption = Annotated[
    float | None,
    typer.Option(
        "--kl",
        metavar="NATS",
        help="Dose of every word and operator without a λ of its own: the strength at which the 95th percentile of "
        "KL(plain‖steered) was that when it was measured. Default: 0.5 for words, the recommended λ for operators.",
        rich_help_panel=_STEERING,
    ),
]
RuleOption = Annotated[
    RuleChoice | None,
    typer.Option("--rule", help="Rule of every operator. Default: each one's own.", rich_help_panel=_STEERING),
]
MaxTokensOption = Annotated[int | None, typer.Option("--max-tokens", metavar="N", rich_help_panel=_SAMPLING)]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", metavar="T", help="0 is greedy.", rich_help_panel=_SAMPLING)
]
TopPOption = Annotated[float | None, typer.Option("--top-p", metavar="P", rich_help_panel=_SAMPLING)]
TopKOption = Annotated[int | None, typer.Option("--top-k", metavar="K", rich_help_panel=_SAMPLING)]
MinPOption = Annotated[float | None, typer.Option("--min-p", metavar="P", rich_help_panel=_SAMPLING)]
PenaltyOption = Annotated[float | None, typer.Option("--repetition-penalty", metavar="R", rich_help_panel=_SAMPLING)]
PresenceOption = Annotated[
    float | None,
    typer.Option(
        "--presence-penalty",
        metavar="P",
        help="-2 to 2: taken from the logits of tokens generated before.",
        rich_help_panel=_SAMPLING,
    ),
]
FrequencyOption = Annotated[
    float | None,
    typer.Option(
        "--frequency-penalty",
        metavar="P",
        help="-2 to 2: taken from a token's logit once for each time that it was generated.",
        rich_help_panel=_SAMPLING,
    ),
]
BiasOption = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias",
        metavar="ID=BIAS",
        help="Adds BIAS, -100 to 100, to the logit of a token. May be repeated; steer tokenize shows ids.",
        rich_help_panel=_SAMPLING,
    ),
]
MinTokensOption = Annotated[
    int | None,
    typer.Option("--min-tokens", metavar="N", help="Nothing ends the text before so many.", rich_help_panel=_SAMPLING),
]
KeepSpecialOption = Annotated[
    bool,
    typer.Option("--keep-special-tokens", help="Show special tokens in the text.", rich_help_panel=_SAMPLING),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", metavar="S", help="Repeats a drawn text.", rich_help_panel=_SAMPLING),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        help="Ends the text before TEXT. May be repeated.",
        rich_help_panel=_SAMPLING,
    ),
]
IgnoreEosOption = Annotated[
    bool,
    typer.Option("--ignore-eos", help="Decode through end-of-sequence tokens.", rich_help_panel=_SAMPLING),
]
LogprobsOption = Annotated[
    int | None,
    typer.Option(
        "--logprobs",
        metavar="N",
        help="With --json: log-probabilities, with N alternatives for each token.",
        rich_help_panel=_SAMPLING,
    ),
]
TimeLimitOption = Annotated[
    float | None,
    typer.Option(
        "--time-limit",
        metavar="SECONDS",
        help="Return what there is after so long.",
        rich_help_panel=_SAMPLING,
    ),
]
ChatOption = Annotated[bool, typer.Option("--chat", help="PROMPT is a user's message: use the model's chat template.")]
AssistantOption = Annotated[
    str | None,
    typer.Option("--assistant", metavar="TEXT", help="With --chat: how the answer begins; the text goes on with it."),
]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--template-option",
        metavar="NAME=VALUE",
        help="With --chat: what the template is told, such as enable_thinking=false. May be repeated.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=_CONNECTION)
]
NoScoreOption = Annotated[
    bool,
    typer.Option("--no-score", help="Do not measure KL and perplexities: one row less.", rich_help_panel=_STEERING),
]
NameArgument = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="Show all about this one.", show_default=False)
]
ReloadOption = Annotated[bool, typer.Option("--reload", help="Make the server read its store again first.")]


@dataclass(frozen=True, slots=True)
class SteeringOptions:
    """Which operators steer the text, and how."""

    operator: OperatorOption = None
    word: WordOption = None
    kl: KLOption = None
    lens: LensOption = LENS
    rule: RuleOption = None

    def uses(self, others: Sequence[steer_client.OperatorUse] = ()) -> tuple[steer_client.OperatorUse, ...]:
        """Reads the --operator and --word options; a wrong one is a usage error.

        `others`: uses that were read elsewhere, which --kl, --rule and --lens speak of too.
        """
        rule: steer_client.Rule | None = None if self.rule is None else self.rule.value
        operators = self._read("'--operator'", partial(steer_client.OperatorUse.parse, rule=rule), self.operator)
        words = self._read("'--word'", partial(steer_client.Words.parse_words, lens=self.lens), self.word)
        uses = (*operators, *words)
        every = (*uses, *others)
        if self.kl is not None and all(use.kl is None for use in every):
            raise typer.BadParameter("there is no word or operator without a λ of its own", param_hint="'--kl'")
        if rule is not None and all(use.words for use in every):
            raise typer.BadParameter("there is no operator: a word has no rule", param_hint="'--rule'")
        if self.lens != LENS and not any(use.words for use in every):
            raise typer.BadParameter("there is no word for it", param_hint="'--lens'")
        return uses

    def _read(
        self, option: str, parse: Callable[..., steer_client.OperatorUse], texts: list[str] | None
    ) -> tuple[steer_client.OperatorUse, ...]:
        try:
            return tuple(parse(text, kl=self.kl) for text in texts or ())
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=option) from None


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Whether the prompt is a user's message, and how its answer begins."""

    chat: ChatOption = False
    assistant: AssistantOption = None
    template_option: TemplateOption = None

    def prompt(self, text: str) -> steer_client.Prompt:
        """As the SDK takes it. Options of a chat without one are a usage error."""
        if not self.chat:
            for option, value in (("'--assistant'", self.assistant), ("'--template-option'", self.template_option)):
                if value is not None and value != []:
                    raise typer.BadParameter("is for a chat: add --chat", param_hint=option)
            return text
        turns = [steer_client.ChatMessage("user", text)]
        if self.assistant is not None:
            turns.append(steer_client.ChatMessage("assistant", self.assistant))
        options = dict(map(_template_option, self.template_option or ()))
        return steer_client.Chat(tuple(turns), self.assistant is not None, options)


def _template_option(text: str) -> tuple[str, bool | str | float]:
    """true and false are flags, and what reads as a number is one; in quotes it is a text."""
    name, has_value, written = text.partition("=")
    if not name or not has_value:
        problem = f"cannot read {text!r}: write NAME=VALUE, for example enable_thinking=false"
        raise typer.BadParameter(problem, param_hint="'--template-option'")
    try:
        value = json.loads(written)
    except ValueError:
        value = written
    return name, value if isinstance(value, (bool, int, float, str)) else written


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are drawn; an option that is not given is left to the server."""

    max_tokens: MaxTokensOption = None
    min_tokens: MinTokensOption = None
    temperature: TemperatureOption = None
    top_p: TopPOption = None
    top_k: TopKOption = None
    min_p: MinPOption = None
    repetition_penalty: PenaltyOption = None
    presence_penalty: PresenceOption = None
    frequency_penalty: FrequencyOption = None
    logit_bias: BiasOption = None
    seed: SeedOption = None
    stop: StopOption = None
    ignore_eos: IgnoreEosOption = False
    keep_special_tokens: KeepSpecialOption = False
    logprobs: LogprobsOption = None
    time_limit: TimeLimitOption = None

    def params(self) -> steer_client.SamplingParams:
        """As the SDK takes them."""
        return steer_client.SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(map(_token_bias, self.logit_bias or ())),
            min_tokens=self.min_tokens,
            skip_special_tokens=False if self.keep_special_tokens else None,
            seed=self.seed,
            max_tokens=self.max_tokens,
            stop_strings=tuple(self.stop or ()),
            ignore_eos=True if self.ignore_eos else None,
            logprobs=self.logprobs,
            time_limit=self.time_limit,
        )


def _token_bias(text: str) -> steer_client.TokenBias:
    token_id, _, bias = text.partition("=")
    try:
        return steer_client.TokenBias(read_whole(token_id), read_decimal(bias))
    except ValueError:
        problem = f"cannot read {text!r}: write ID=BIAS, for example 42=-5"
        raise typer.BadParameter(problem, param_hint="'--logit-bias'") from None
