"""Requests on their way in: measured as bytes, and parsed only where they hold no more than is accepted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from steering.convert import FieldError
from steering.measure import LimitError, Measure

from operators.core.vector_source import MAX_LENS_WORDS
from steer_server.errors import InvalidRequestError, PromptTooLongError
from steer_server.rpc.request_limits import MAX_CHAT_MESSAGES, MAX_MESSAGES, field_limits
from steer_server.types import (
    MAX_ARM_NAME,
    MAX_OPERATORS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    ModelInfo,
    RequestLimits,
)

_TYPED = 2
"""Requests of up to so many times the largest are refused by us, who name the field; beyond that gRPC refuses them."""
_LEAST_RECEIVED = 4 << 20
"""What gRPC receives where nothing is set."""
_OF_PROMPTS = {
    "steering.v1.TokenIds.ids": "tokens",
    "steering.v1.Prompt.text": "bytes",
    "steering.v1.Prompt.chat": "bytes",
    "steering.v1.ChatMessage.content": "bytes",
}
"""Fields that are too long where a prompt is, and what is counted in each."""


class Admission:
    """The measures of every method of some services."""

    def __init__(
        self, pool: DescriptorPool, services: Iterable[str], model: ModelInfo, *, max_prompt_bytes: int, max_arms: int
    ) -> None:
        """``services``: by their full names, all of which ``pool`` knows."""
        limits = field_limits(model, max_prompt_bytes=max_prompt_bytes, max_arms=max_arms)
        methods = [method for name in services for method in pool.FindServiceByName(name).methods]
        self._context_length = model.context_length
        self._measures = {
            f"/{method.containing_service.full_name}/{method.name}": Measure(
                method.input_type, limits, max_messages=MAX_MESSAGES, is_strict=_is_ours
            )
            for method in methods
        }
        self.limits = RequestLimits(
            max_prompt_bytes=max_prompt_bytes,
            max_chat_messages=MAX_CHAT_MESSAGES,
            max_operators=MAX_OPERATORS,
            max_words=MAX_LENS_WORDS,
            max_stops=MAX_STOPS,
            max_stop_characters=MAX_STOP_CHARACTERS,
            max_arm_name_characters=MAX_ARM_NAME,
            max_messages=MAX_MESSAGES,
            max_request_bytes=max(measure.max_bytes for measure in self._measures.values()),
        )
        """What is accepted, for clients."""
        self.max_received_bytes = max(_TYPED * self.limits.max_request_bytes, _LEAST_RECEIVED)
        """Of a message that gRPC hands on at all."""

    def read(self, method: str, data: bytes, parse: Callable[[bytes], Any]) -> Any:
        """The message of a request to ``method`` ("/service/name").

        Raises:
            PromptTooLongError: the prompt has more than could fit into the context.
            InvalidRequestError: another field has more than is accepted, or the bytes are no such message.
        """
        try:
            self._measures[method].check(data)
            return parse(data)
        except LimitError as error:
            unit = _OF_PROMPTS.get(error.field.full_name)
            if unit is not None and error.path.startswith("prompt"):
                problem = PromptTooLongError(error.found, self._context_length, unit=unit)
                problem.move(_of_prompt(error.path))
                raise problem from None
            raise InvalidRequestError(error.path, error.problem) from None
        except FieldError as error:
            raise InvalidRequestError(error.path or "request", error.problem) from None
        except DecodeError as error:
            # Of the right fields, and with text that is not UTF-8.
            raise InvalidRequestError("request", f"is not a message of this method: {error}") from None


def _of_prompt(path: str) -> str:
    """The prompt that a field is of, which may be one of several."""
    found = re.match(r"(prompts\[[0-9]+\]\.)?prompt", path)
    return found[0] if found else path


def _is_ours(message: Descriptor) -> bool:
    return bool(message.file.package == "steering.v1")
