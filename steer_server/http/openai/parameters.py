"""The bodies of OpenAI's API as far as this server acts upon them, and the names of what it does not.

Ranges are those of the contract, and checked there. What is null counts as not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from steer_server.errors import InvalidRequestError

_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
}
"""Parameters of OpenAI's API that this server does not have, and the values of each that ask for nothing."""

_UNKNOWN = "is no parameter of this server; what is asked for is never left out"

_P = TypeVar("_P", bound="TextParameters")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        # Clients send turns back as they got them, with all that OpenAI's own may have.
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name in cls.model_fields}


class StreamOptions(_Part):
    """Of a stream."""

    include_usage: bool | None = None


class TextParameters(_Part):
    """What both kinds of texts take."""

    model: str
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Says who asks, for OpenAI's own statistics; nothing depends on it."""
    # Of vLLM.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stop_token_ids: list[int] | None = None
    return_token_ids: bool | None = None
    steering: Any = None


class CompletionParameters(TextParameters):
    """Of ``/v1/completions``."""

    prompt: Any
    logprobs: int | None = None


class ChatMessage(_Part):
    """One turn."""

    role: str
    content: Any


class ChatParameters(TextParameters):
    """Of ``/v1/chat/completions``."""

    messages: list[ChatMessage]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    # Of vLLM.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def read_parameters(kind: type[_P], body: Mapping[str, Any]) -> _P:
    """The parameters in a body. Raises :class:`InvalidRequestError`, which names the first that is not accepted."""
    given = {}
    for name, value in body.items():
        nothing = _WITHOUT_EFFECT.get(name, ())
        if name in kind.model_fields:
            given[name] = value
        elif value is not None and not any(value == each and type(value) is type(each) for each in nothing):
            accepted = "".join(f"; {each!r} is accepted" for each in nothing)
            raise InvalidRequestError(name[:256], f"{_UNKNOWN}{accepted}")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidRequestError(_path(first["loc"]), _in_words(first["type"], first["msg"])) from None


def _path(parts: tuple[int | str, ...]) -> str:
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:256]}" if path else part
    return path


def _in_words(kind: str, message: str) -> str:
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return _UNKNOWN
    return message[:1].lower() + message[1:]
