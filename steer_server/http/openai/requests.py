"""From parameters to a request of the contract: a comparison of one arm, of as many texts as are asked for."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from steering.v1 import comparison_pb2, text_pb2

from steer_server.errors import InvalidRequestError
from steer_server.http.openai.parameters import ChatMessage, ChatParameters, CompletionParameters, TextParameters
from steer_server.http.openai.steering import operators_of
from steer_server.rpc.parts import ServerParts

_ARM = "steered"
_COMPLETION_TOKENS = 16
"""OpenAI's default of completions. A chat has none: it may go on until the context is full, or what there is room for
is used."""
_SEED_BITS = 53
"""Of a seed that is drawn: a number that every reader of JSON keeps."""
_WHOLE = 2**53
"""Whole numbers up to this one are themselves as a double."""
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_ONE_OF_SEVERAL = re.compile(r"prompts(\[[0-9]+\])(?:\.prompt)?(?:\.text|\.token_ids)?")
_INT32, _UINT64 = 2**31, 2**64


@dataclass(frozen=True)
class Asked:
    """A request, and what its answer needs."""

    message: comparison_pb2.CompareRequest
    names: tuple[tuple[str, str], ...]
    """Paths in the message, and what the parameters at them are called. The first that fits is taken."""
    request_id: str
    model: str
    """As the request names it."""
    created: int
    """Seconds since 1970."""
    is_chat: bool
    streams: bool
    has_usage: bool
    """Whether a stream ends with the number of tokens."""
    has_logprobs: bool
    has_token_ids: bool

    def renamed(self, error: InvalidRequestError) -> InvalidRequestError:
        """The error under the name that the caller knows its field by."""
        one_of_several = _ONE_OF_SEVERAL.match(error.field)
        names = self.names
        if one_of_several is not None:
            names = ((one_of_several[0], f"prompt{one_of_several[1]}"),)
        for path, name in names:
            if error.field == path or error.field.startswith((f"{path}.", f"{path}[")):
                error.move((name + error.field[len(path) :]).removeprefix("."))
                break
        return error


def asked_completion(parts: ServerParts, given: CompletionParameters) -> Asked:
    """Raises :class:`InvalidRequestError` and :class:`RefusedError`."""
    sampling = _sampling(given, given.max_tokens, "max_tokens", otherwise=_COMPLETION_TOKENS)
    if given.logprobs is not None:
        sampling.logprobs = _number(given.logprobs, "logprobs")
    return _asked(parts, given, sampling, _prompts(given.prompt), names=_NAMES)


def asked_chat(parts: ServerParts, given: ChatParameters) -> Asked:
    """Raises :class:`InvalidRequestError` and :class:`RefusedError`."""
    if given.max_tokens is not None and given.max_completion_tokens is not None:
        raise InvalidRequestError("max_tokens", "is given beside max_completion_tokens; one is accepted")
    name = "max_tokens" if given.max_tokens is not None else "max_completion_tokens"
    most = given.max_tokens if given.max_tokens is not None else given.max_completion_tokens
    sampling = _sampling(given, most, name, otherwise=parts.model.context_length)
    if given.logprobs:
        sampling.logprobs = _number(given.top_logprobs or 0, "top_logprobs")
    elif given.top_logprobs is not None:
        raise InvalidRequestError("top_logprobs", "is given without logprobs; set logprobs to true")
    names = (
        ("sampling.max_tokens", name),
        ("sampling.logprobs", "top_logprobs"),
        ("prompt.chat.messages", "messages"),
        ("prompt.chat.template_options", "chat_template_kwargs"),
        ("prompt.chat.continue_final_message", "continue_final_message"),
        ("prompt.chat", "messages"),
    )
    chat = _chat(given)
    return _asked(parts, given, sampling, [text_pb2.Prompt(chat=chat)], names=(*names, ("prompt", "messages"), *_NAMES))


_NAMES = (
    ("sampling.stop_strings", "stop"),
    ("sampling", ""),
    ("prompt.text", "prompt"),
    ("prompt.token_ids", "prompt"),
)


def _asked(
    parts: ServerParts,
    given: TextParameters,
    sampling: text_pb2.SamplingParams,
    prompts: Sequence[text_pb2.Prompt],
    *,
    names: tuple[tuple[str, str], ...],
) -> Asked:
    operators, field = operators_of(given.steering, given.model, parts.model.model)
    if given.stream_options is not None and not given.stream:
        raise InvalidRequestError("stream_options", "is given for what is no stream; set stream to true")
    request_id = secrets.token_hex(8)
    message = comparison_pb2.CompareRequest(
        request_id=request_id,
        prompt=prompts[0] if len(prompts) == 1 else None,
        prompts=list(_named(prompts, is_seeded=given.seed is not None)) if len(prompts) > 1 else (),
        sampling=sampling,
        arms=[comparison_pb2.Arm(name=_ARM, operators=operators)] if operators else (),
        n=None if given.n is None else _number(given.n, "n"),
        normal=not operators,
        # The pieces of a stream are all there is of it.
        repeat_in_finished=not given.stream,
        score=False,
    )
    return Asked(
        message,
        (("arms[0].operators", field), ("arms", field), ("prompts", "prompt"), *names),
        request_id,
        given.model,
        int(time.time()),
        is_chat=isinstance(given, ChatParameters),
        streams=bool(given.stream),
        has_usage=given.stream_options is not None and bool(given.stream_options.include_usage),
        has_logprobs=sampling.HasField("logprobs"),
        has_token_ids=bool(given.return_token_ids),
    )


def _named(prompts: Sequence[text_pb2.Prompt], *, is_seeded: bool) -> Iterator[comparison_pb2.NamedPrompt]:
    for number, prompt in enumerate(prompts):
        # As vLLM has it: a seed that is given is every prompt's, and without one the same prompt twice has two texts.
        seed = None if is_seeded else secrets.randbits(_SEED_BITS)
        yield comparison_pb2.NamedPrompt(id=str(number), prompt=prompt, seed=seed)


def _sampling(given: TextParameters, most: int | None, name: str, *, otherwise: int) -> text_pb2.SamplingParams:
    """OpenAI's defaults where they are others than the contract's.

    ``most``: tokens, which the parameter ``name`` asks for. None: as many as the server has room for, up to
    ``otherwise``.
    """
    seed = secrets.randbits(_SEED_BITS) if given.seed is None else given.seed
    if not 0 <= seed < _UINT64:
        raise InvalidRequestError("seed", f"is {seed}; 0 to {_UINT64 - 1} is accepted")
    top_k = given.top_k
    return text_pb2.SamplingParams(
        temperature=1.0 if given.temperature is None else given.temperature,
        top_p=given.top_p,
        # vLLM's other way to say that it is off.
        top_k=0 if top_k == -1 else None if top_k is None else _number(top_k, "top_k"),
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty,
        seed=seed,
        max_tokens=otherwise if most is None else _number(most, name),
        fit_max_tokens=most is None,
        stop_strings=_stops(given.stop),
        stop_token_ids=_numbers(given.stop_token_ids or (), "stop_token_ids"),
        ignore_eos=given.ignore_eos,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        logit_bias=[_bias(token, bias) for token, bias in (given.logit_bias or {}).items()],
        min_tokens=None if given.min_tokens is None else _number(given.min_tokens, "min_tokens"),
        skip_special_tokens=given.skip_special_tokens,
    )


def _prompts(value: Any) -> list[text_pb2.Prompt]:
    """One, or one for each item."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        return [_prompt(each, f"prompt[{index}]") for index, each in enumerate(value)]
    return [_prompt(value, "prompt")]


def _prompt(value: Any, field: str) -> text_pb2.Prompt:
    if isinstance(value, str):
        return text_pb2.Prompt(text=value)
    if isinstance(value, list) and all(type(each) is int for each in value):
        return text_pb2.Prompt(token_ids=text_pb2.TokenIds(ids=_numbers(value, field)))
    raise InvalidRequestError(field, "is neither a text nor token ids")


def _chat(given: ChatParameters) -> text_pb2.Chat:
    continues = bool(given.continue_final_message)
    if given.add_generation_prompt is not None and given.add_generation_prompt == continues:
        raise InvalidRequestError(
            "add_generation_prompt",
            f"is {given.add_generation_prompt}; false is accepted with continue_final_message, and true without",
        )
    return text_pb2.Chat(
        messages=[_turn(turn, f"messages[{index}]") for index, turn in enumerate(given.messages)],
        continue_final_message=continues,
        template_options=[_option(name, value) for name, value in (given.chat_template_kwargs or {}).items()],
    )


def _option(name: str, value: Any) -> text_pb2.TemplateOption:
    if isinstance(value, bool):
        return text_pb2.TemplateOption(name=name, boolean=value)
    if isinstance(value, str):
        return text_pb2.TemplateOption(name=name, text=value)
    if isinstance(value, int | float) and abs(value) <= _WHOLE:
        return text_pb2.TemplateOption(name=name, number=value)
    raise InvalidRequestError(f"chat_template_kwargs.{name[:64]}", "is no flag, text or number that a double holds")


def _turn(given: ChatMessage, field: str) -> text_pb2.ChatMessage:
    content = given.content
    if isinstance(content, list):
        texts = [_text_of(part, f"{field}.content[{index}]") for index, part in enumerate(content)]
        # As vLLM joins them for templates that know texts alone.
        content = "\n".join(texts)
    if not isinstance(content, str):
        raise InvalidRequestError(f"{field}.content", 'is no text; a text, or parts {"type": "text", "text": ...}')
    return text_pb2.ChatMessage(role=given.role, content=content)


def _text_of(part: Any, field: str) -> str:
    if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
        text = part["text"]
        if isinstance(text, str):
            return text
    raise InvalidRequestError(field, 'is not understood; {"type": "text", "text": ...} is accepted')


def _stops(value: Any) -> Sequence[str]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise InvalidRequestError("stop", "is neither a text nor a list of texts")
    return stops


def _bias(token: str, bias: float) -> text_pb2.TokenBias:
    if not _TOKEN_ID.fullmatch(token):
        raise InvalidRequestError("logit_bias", f"has {token[:32]!r}, which is no token id")
    return text_pb2.TokenBias(token_id=_number(int(token), "logit_bias"), bias=bias)


def _number(value: int, field: str) -> int:
    if not -_INT32 <= value < _INT32:
        raise InvalidRequestError(field, f"is {value}; a number from {-_INT32} to {_INT32 - 1} is accepted")
    return value


def _numbers(values: Sequence[int], field: str) -> Sequence[int]:
    for index, value in enumerate(values):
        _number(value, f"{field}[{index}]")
    return values
