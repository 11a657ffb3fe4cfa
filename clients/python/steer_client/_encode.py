"""Requests to protobuf.

Ranges are the server's to judge. Refused here is only what the wire cannot carry, because protobuf's own
errors do not name the field.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from steering.v1 import generation_pb2 as pb

from steer_client._errors import InvalidRequestError
from steer_client._requests import Chat, ChatMessage, OperatorUse, Prompt, SamplingParams

_T = TypeVar("_T")
_INT32 = (-(2**31), 2**31 - 1)
_UINT64 = (0, 2**64 - 1)
# google.protobuf.Duration reaches about ten thousand years.
_MAX_SECONDS = 315_576_000_000
_RULES: Mapping[object, pb.Rule.ValueType] = {
    None: pb.RULE_UNSPECIFIED,
    "cumulative": pb.RULE_CUMULATIVE,
    "substitute": pb.RULE_SUBSTITUTE,
}


def generate_request(
    prompt: Prompt, operators: Sequence[OperatorUse], sampling: SamplingParams, request_id: str
) -> pb.GenerateRequest:
    """Raises InvalidRequestError, as every function here, for a value that cannot be sent."""
    return pb.GenerateRequest(
        request_id=_text(request_id, "request_id"),
        prompt=prompt_message(prompt),
        sampling=sampling_message(sampling),
        operators=[operator_use(use, f"operators[{i}]") for i, use in enumerate(operators)],
    )


def compare_request(
    prompt: Prompt,
    arms: Mapping[str, Sequence[OperatorUse]],
    sampling: SamplingParams,
    request_id: str,
    score: bool,
) -> pb.CompareRequest:
    """One arm per name, in the mapping's order."""
    return pb.CompareRequest(
        request_id=_text(request_id, "request_id"),
        prompt=prompt_message(prompt),
        sampling=sampling_message(sampling),
        arms=[
            pb.Arm(
                name=_text(name, f"arms[{i}].name"),
                operators=[operator_use(use, f"arms[{i}].operators[{k}]") for k, use in enumerate(uses)],
            )
            for i, (name, uses) in enumerate(arms.items())
        ],
        score=_flag(score, "score"),
    )


def prompt_message(prompt: Prompt) -> pb.Prompt:
    """Text, token ids or chat. An empty sequence stands for no token ids."""
    if isinstance(prompt, str):
        return pb.Prompt(text=_text(prompt, "prompt.text"))
    if isinstance(prompt, Chat):
        return _chat(prompt.messages)
    parts = _items(prompt, "prompt", "text, token ids or chat messages")
    if parts and isinstance(parts[0], ChatMessage):
        return _chat(parts)
    return pb.Prompt(token_ids=pb.TokenIds(ids=_ints(parts, "prompt.token_ids")))


def sampling_message(sampling: SamplingParams) -> pb.SamplingParams:
    """Only what is set is sent."""
    if not isinstance(sampling, SamplingParams):
        raise _refused("sampling", "a SamplingParams", sampling)
    message = pb.SamplingParams(
        stop_strings=[
            _text(stop, f"sampling.stop_strings[{i}]")
            for i, stop in enumerate(_items(sampling.stop_strings, "sampling.stop_strings", "texts"))
        ],
        stop_token_ids=_ints(sampling.stop_token_ids, "sampling.stop_token_ids"),
    )
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        _set(message, name, sampling, _number)
    for name in ("top_k", "max_tokens", "logprobs"):
        _set(message, name, sampling, _int32)
    if sampling.seed is not None:
        message.seed = _integer(sampling.seed, "sampling.seed", _UINT64)
    if sampling.ignore_eos is not None:
        message.ignore_eos = _flag(sampling.ignore_eos, "sampling.ignore_eos")
    if sampling.time_limit is not None:
        message.time_limit.CopyFrom(_duration(sampling.time_limit, "sampling.time_limit"))
    return message


def operator_use(use: OperatorUse, path: str) -> pb.OperatorUse:
    """`path` is the place in the request that errors name."""
    if not isinstance(use, OperatorUse):
        raise _refused(path, "an OperatorUse", use)
    if not (use.rule is None or isinstance(use.rule, str)) or use.rule not in _RULES:
        raise _refused(f"{path}.rule", '"cumulative", "substitute" or None', use.rule)
    return pb.OperatorUse(
        name=_text(use.name, f"{path}.name"),
        strength=None if use.strength is None else _number(use.strength, f"{path}.strength"),
        rule=_RULES[use.rule],
        blend=None if use.blend is None else _number(use.blend, f"{path}.blend"),
    )


def seconds(timeout: float | None) -> float | None:
    """A timeout as gRPC takes it."""
    if timeout is None:
        return None
    value = _number(timeout, "timeout")
    if math.isnan(value):
        raise _refused("timeout", "a number of seconds", timeout)
    return None if value == math.inf else value


def uses(operators: Iterable[OperatorUse], field: str) -> tuple[OperatorUse, ...]:
    """The operators as a tuple, so that an iterator can be both sent and checked."""
    return tuple(_items(operators, field, "a sequence of OperatorUse"))


def name(value: str, field: str) -> str:
    """A text field of a request that has no other."""
    return _text(value, field)


def _chat(messages: Iterable[object]) -> pb.Prompt:
    chat = pb.Chat()
    for i, message in enumerate(messages):
        path = f"prompt.chat.messages[{i}]"
        if not isinstance(message, ChatMessage):
            raise _refused(path, "a ChatMessage", message)
        chat.messages.add(role=_text(message.role, f"{path}.role"), content=_text(message.content, f"{path}.content"))
    return pb.Prompt(chat=chat)


def _set(message: Message, name: str, sampling: SamplingParams, convert: object) -> None:
    value = getattr(sampling, name)
    if value is not None:
        setattr(message, name, convert(value, f"sampling.{name}"))  # type: ignore[operator]


def _items(value: Iterable[_T], field: str, wanted: str) -> list[_T]:
    # A text is a sequence of texts and bytes one of integers; neither is ever meant that way.
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        raise _refused(field, wanted, value)
    return list(value)


def _ints(values: Iterable[object], field: str) -> list[int]:
    return [_int32(value, f"{field}[{i}]") for i, value in enumerate(_items(values, field, "a sequence of integers"))]


def _int32(value: object, field: str) -> int:
    return _integer(value, field, _INT32)


def _integer(value: object, field: str, bounds: tuple[int, int]) -> int:
    low, high = bounds
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise _refused(field, "an integer", value) from None
    if not low <= number <= high:
        raise _refused(field, f"an integer from {low} to {high}", value)
    return number


def _number(value: object, field: str) -> float:
    if isinstance(value, (bool, str, bytes)):
        raise _refused(field, "a number", value)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise _refused(field, "a number", value) from None


def _flag(value: object, field: str) -> bool:
    if not isinstance(value, bool):
        raise _refused(field, "True or False", value)
    return value


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise _refused(field, "a text", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _refused(field, "text that UTF-8 can encode", value) from None
    return value


def _duration(value: object, field: str) -> Duration:
    number = _number(value, field)
    if not -_MAX_SECONDS <= number <= _MAX_SECONDS:
        raise _refused(field, f"seconds within ±{_MAX_SECONDS}", value)
    whole, part = divmod(abs(number), 1)
    nanos = round(part * 1e9)
    total = int(whole) * 10**9 + nanos
    sign = -1 if number < 0 else 1
    return Duration(seconds=sign * (total // 10**9), nanos=sign * (total % 10**9))


def _refused(field: str, wanted: str, value: object) -> InvalidRequestError:
    shown = repr(value)
    if len(shown) > 60:
        shown = f"{shown[:57]}..."
    return InvalidRequestError(f"{field}: {wanted} is needed, not {shown}", field=field)
