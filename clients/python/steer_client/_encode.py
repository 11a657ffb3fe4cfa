"""Requests to protobuf. Raises InvalidRequestError, which names the field, for a value that cannot be sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message
from steering.convert import FieldError, Writer, writer
from steering.v1 import comparison_pb2, score_pb2
from steering.v1 import generation_pb2 as pb
from steering.v1 import operators_pb2 as operators_pb

from steer_client._accept import accept, items, number, refused
from steer_client._errors import InvalidRequestError
from steer_client._requests import (
    Arm,
    Chat,
    ChatInput,
    ChatMessage,
    CompareRequest,
    GenerateRequest,
    GetOperatorRequest,
    NamedArm,
    NamedPrompt,
    Operators,
    OperatorUse,
    Prompt,
    PromptInput,
    Prompts,
    SamplingParams,
    ScoreRequest,
    TemplateOption,
    TokenizeRequest,
    TokenReport,
)

_M = TypeVar("_M", bound=Message)

_write_generate_request = writer(pb.GenerateRequest, GenerateRequest, accept)
_write_compare_request = writer(comparison_pb2.CompareRequest, CompareRequest, accept)
_write_score_request = writer(score_pb2.ScoreRequest, ScoreRequest, accept)
_write_tokenize_request = writer(pb.TokenizeRequest, TokenizeRequest, accept)
_write_get_operator_request = writer(operators_pb.GetOperatorRequest, GetOperatorRequest, accept)


def generate_request(
    prompt: Prompt, operators: Sequence[OperatorUse], sampling: SamplingParams, request_id: str, n: int = 1
) -> pb.GenerateRequest:
    """What a generation is asked for with. What is as the contract has it by default is not sent."""
    request = GenerateRequest(request_id, prompt_input(prompt), sampling, operators, None if n == 1 else n)
    return _write(_write_generate_request, request)


def compare_request(
    prompt: Prompt,
    arms: Sequence[NamedArm],
    sampling: SamplingParams,
    request_id: str,
    *,
    score: bool,
    n: int = 1,
    normal: bool = True,
    report: TokenReport | None = None,
) -> comparison_pb2.CompareRequest:
    """What a comparison is asked for with. What is as the contract has it by default is not sent."""
    asked = (None if n == 1 else n, None if normal is True else normal)
    request = CompareRequest(request_id, prompt_input(prompt), sampling, arms, score, *asked, report=report)
    return _write(_write_compare_request, request)


def compare_many_request(
    prompts: Mapping[str, Prompt],
    arms: Sequence[NamedArm],
    sampling: SamplingParams,
    request_id: str,
    *,
    score: bool,
    n: int = 1,
    normal: bool = True,
    report: TokenReport | None = None,
) -> comparison_pb2.CompareRequest:
    """As compare_request, of several prompts. The end of a text does not repeat what was streamed of it."""
    named = []
    for index, (name, prompt) in enumerate(prompts.items()):
        try:
            named.append(NamedPrompt(name, prompt_input(prompt)))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"prompts[{index}].{error.message}", field=f"prompts[{index}].prompt") from None
    request = CompareRequest(
        request_id, None, sampling, arms, score, n, normal, named, repeat_in_finished=False, report=report
    )
    return _write(_write_compare_request, request)


def prompts_by_id(prompts: Prompts) -> dict[str, Prompt]:
    """By the ids that they were given, or by their places."""
    if isinstance(prompts, Mapping):
        return dict(prompts)
    return {str(place): prompt for place, prompt in enumerate(_items(prompts, "prompts", "a sequence of prompts"))}


def score_request(
    text: str | Sequence[int],
    prompt: Prompt | None,
    arms: Sequence[NamedArm],
    report: TokenReport,
    request_id: str,
    time_limit: float | None,
) -> score_pb2.ScoreRequest:
    """What the score of a text is asked for with. Without arms: the plain model alone."""
    given, ids = (text, None) if isinstance(text, str) else (None, _items(text, "text", "text or token ids"))
    before = None if prompt is None else prompt_input(prompt)
    asked = None if report == TokenReport() else report
    return _write(_write_score_request, ScoreRequest(request_id, before, given, ids, arms, asked, time_limit))


def tokenize_request(prompt: Prompt) -> pb.TokenizeRequest:
    """What a prompt's token ids are asked for with."""
    return _write(_write_tokenize_request, TokenizeRequest(prompt_input(prompt)))


def get_operator_request(name: str) -> operators_pb.GetOperatorRequest:
    """What one operator is asked for with."""
    return _write(_write_get_operator_request, GetOperatorRequest(name))


def prompt_input(prompt: Prompt) -> PromptInput:
    """Which of its alternatives a prompt is. An empty sequence stands for no token ids."""
    if isinstance(prompt, str):
        return PromptInput(text=prompt)
    if isinstance(prompt, Chat):
        return PromptInput(chat=_chat_input(prompt))
    parts = _items(prompt, "prompt", "text, token ids or chat messages")
    if parts and isinstance(parts[0], ChatMessage):
        return PromptInput(chat=_chat_input(Chat(parts)))
    return PromptInput(token_ids=parts)


def _chat_input(chat: Chat) -> ChatInput:
    if not isinstance(chat.template_options, Mapping):
        problem = refused("a mapping of names to values", chat.template_options)
        raise _invalid(problem.under("prompt.chat.template_options"))
    options = tuple(_template_option(*each) for each in chat.template_options.items())
    return ChatInput(chat.messages, chat.continue_final_message, options)


def _template_option(name: str, value: bool | str | float) -> TemplateOption:
    if isinstance(value, bool):
        return TemplateOption(name, boolean=value)
    return TemplateOption(name, text=value) if isinstance(value, str) else TemplateOption(name, number=value)


def seconds(timeout: float | None) -> float | None:
    """A timeout as gRPC takes it."""
    if timeout is None:
        return None
    try:
        value = number(timeout)
        if math.isnan(value):
            raise refused("a number of seconds", timeout)
    except FieldError as error:
        raise _invalid(error.prepend("timeout")) from None
    return None if value == math.inf else value


def uses(operators: Operators, field: str) -> tuple[OperatorUse, ...]:
    """The operators as a tuple, so that an iterator can be both sent and checked."""
    if isinstance(operators, Mapping):
        return tuple(OperatorUse(name, strength) for name, strength in operators.items())
    if isinstance(operators, (str, OperatorUse)):
        return (_use(operators, field),)
    parts = _items(operators, field, 'a sequence of OperatorUse or of texts such as "ocean=0.4"')
    return tuple(_use(part, f"{field}[{index}]") for index, part in enumerate(parts))


def _use(part: str | OperatorUse, field: str) -> OperatorUse:
    if not isinstance(part, str):
        return part
    try:
        return OperatorUse.parse(part)
    except ValueError as error:
        raise InvalidRequestError(f"{field}: {error}", field=field) from None


def named_arms(arms: Mapping[str, Operators | Arm]) -> tuple[NamedArm, ...]:
    """One arm per name, in the mapping's order."""
    if not isinstance(arms, Mapping):
        raise InvalidRequestError("arms: a mapping from names to operators is needed", field="arms")
    return tuple(_named_arm(name, arm, f"arms[{index}].operators") for index, (name, arm) in enumerate(arms.items()))


def _named_arm(name: str, arm: Operators | Arm, field: str) -> NamedArm:
    if isinstance(arm, Arm):
        return NamedArm(name, uses(arm.operators, field), arm.sampling)
    return NamedArm(name, uses(arm, field))


def _items(values: Any, field: str, wanted: str) -> list[Any]:
    try:
        return items(values, wanted)
    except FieldError as error:
        raise _invalid(error.prepend(field)) from None


def checked_writer(message: type[_M], cls: type) -> Callable[[object], _M]:
    """What turns a request of this class into its message. It raises InvalidRequestError."""
    write = writer(message, cls, accept)
    return lambda request: _write(write, request)


def _write(write: Writer[_M], request: object) -> _M:
    try:
        return write(request)
    except FieldError as error:
        raise _invalid(error) from None


def _invalid(error: FieldError) -> InvalidRequestError:
    return InvalidRequestError(f"{error.path}: {error.problem}", field=error.path)
