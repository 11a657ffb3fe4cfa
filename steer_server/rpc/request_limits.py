"""How much each field of a request may hold, whatever service it is of. Checked on the bytes, before they are parsed.

Sizes are in bytes. A text that has a limit in characters (:mod:`steer_server.types.requests`) may have four bytes for
each here: its own check, which is exact, is what a caller within reach of it meets.
"""

from __future__ import annotations

from steering.measure import Limit

from operators.core.header import MAX_TEXTS, MAX_WORDS
from operators.core.vector_source import MAX_LENS_WORD, MAX_LENS_WORDS, MAX_WORD
from steer_server.types import (
    MAX_ARM_NAME,
    MAX_BIASES,
    MAX_CHUNK,
    MAX_OPERATORS,
    MAX_OPTION_NAME,
    MAX_OPTION_TEXT,
    MAX_OPTIONS,
    MAX_PROMPT_ID,
    MAX_PROMPTS,
    MAX_REPORT_WORDS,
    MAX_REQUEST_ID,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TEXT,
    MAX_UPLOAD_ID,
    ModelInfo,
)

MAX_MESSAGES = 2048
"""Messages inside one request: turns of a chat, arms, uses of operators, words."""
MAX_CHAT_MESSAGES = 1024
_MAX_ROLE = 256
_MAX_OPERATOR_NAME = 256
"""Four times what a store allows: a name that is somewhat too long is an operator that does not exist."""
_MAX_DIGEST = 256
"""More than three times its length: what is wrong with one is said by its own check."""
_MAX_OPTIONS = MAX_OPTIONS * 4 * (MAX_OPTION_NAME + MAX_OPTION_TEXT)
_PROMPTS = 2 << 20
"""Bytes of several prompts together, where one alone may not have more."""
_ARMS = 2 << 20
"""Bytes of all arms together: more than their operators and words can have, and stop strings of their own."""
_TEXTS = 1 << 20
"""Bytes of all texts of a build."""
_MAX_ID = 256
"""Of a build."""
_STANDARD = 1024
"""Bytes of the names that health and reflection are asked for."""


def field_limits(model: ModelInfo, *, max_prompt_bytes: int, max_arms: int) -> dict[str, Limit]:
    """The limits by the full name of the field."""
    own = {
        "TokenIds.ids": Limit(count=model.context_length),
        "ChatMessage.role": Limit(size=_MAX_ROLE),
        "ChatMessage.content": Limit(size=max_prompt_bytes),
        "Chat.messages": Limit(count=MAX_CHAT_MESSAGES),
        "Prompt.text": Limit(size=max_prompt_bytes),
        "Chat.template_options": Limit(count=MAX_OPTIONS),
        "TemplateOption.name": Limit(size=_characters(MAX_OPTION_NAME)),
        "TemplateOption.text": Limit(size=_characters(MAX_OPTION_TEXT)),
        # Of all messages together: a conversation is one text.
        "Prompt.chat": Limit(size=max_prompt_bytes + MAX_CHAT_MESSAGES * _MAX_ROLE + _MAX_OPTIONS),
        "SamplingParams.stop_strings": Limit(size=_characters(MAX_STOP_CHARACTERS), count=MAX_STOPS),
        "SamplingParams.stop_token_ids": Limit(count=MAX_STOPS),
        "SamplingParams.logit_bias": Limit(count=MAX_BIASES),
        "GenerateRequest.request_id": Limit(size=_characters(MAX_REQUEST_ID)),
        "GenerateRequest.operators": Limit(count=MAX_OPERATORS),
        "CompareRequest.request_id": Limit(size=_characters(MAX_REQUEST_ID)),
        "CompareRequest.prompts": Limit(
            count=MAX_PROMPTS,
            total=max(_PROMPTS, max_prompt_bytes + MAX_CHAT_MESSAGES * _MAX_ROLE),
            instead_of="prompt",
        ),
        "NamedPrompt.id": Limit(size=_characters(MAX_PROMPT_ID)),
        # One more may run where the plain one does not.
        "CompareRequest.arms": Limit(count=max_arms + 1, total=_ARMS),
        "ScoreRequest.request_id": Limit(size=_characters(MAX_REQUEST_ID)),
        "ScoreRequest.text": Limit(size=max_prompt_bytes),
        "ScoreRequest.arms": Limit(count=max_arms, total=_ARMS),
        "TokenReport.words": Limit(size=_characters(MAX_LENS_WORD), count=MAX_REPORT_WORDS),
        "Arm.name": Limit(size=_characters(MAX_ARM_NAME)),
        "Arm.operators": Limit(count=MAX_OPERATORS),
        "OperatorUse.name": Limit(size=_MAX_OPERATOR_NAME),
        "OperatorUse.words": Limit(count=MAX_LENS_WORDS),
        "OperatorUse.digest": Limit(size=_MAX_DIGEST),
        "WeightedWord.text": Limit(size=_characters(MAX_LENS_WORD)),
        "GetOperatorRequest.name": Limit(size=_MAX_OPERATOR_NAME),
        "UploadOperatorRequest.chunk": Limit(size=MAX_CHUNK),
        "UploadStart.upload_id": Limit(size=_characters(MAX_UPLOAD_ID)),
        "UploadStart.name": Limit(size=_MAX_OPERATOR_NAME),
        "UploadStart.file_digest": Limit(size=_MAX_DIGEST),
        "UploadStart.replace": Limit(size=_MAX_DIGEST),
        "GetUploadRequest.upload_id": Limit(size=_characters(MAX_UPLOAD_ID)),
        "LoadOperatorRequest.name": Limit(size=_MAX_OPERATOR_NAME),
        "UnloadOperatorRequest.name": Limit(size=_MAX_OPERATOR_NAME),
        "DeleteOperatorRequest.name": Limit(size=_MAX_OPERATOR_NAME),
        "DeleteOperatorRequest.digest": Limit(size=_MAX_DIGEST),
        "BuildOperatorRequest.name": Limit(size=_MAX_OPERATOR_NAME),
        "BuildOperatorRequest.texts": Limit(size=_characters(MAX_TEXT), count=MAX_TEXTS, total=_TEXTS),
        "BuildOperatorRequest.words": Limit(size=_characters(MAX_WORD), count=MAX_WORDS),
        "BuildOperatorRequest.replace": Limit(size=_MAX_DIGEST),
        "WatchBuildRequest.id": Limit(size=_MAX_ID),
        "CancelBuildRequest.id": Limit(size=_MAX_ID),
    }
    standard = {
        "grpc.health.v1.HealthCheckRequest": ("service",),
        "grpc.reflection.v1alpha.ServerReflectionRequest": (
            "host",
            "file_by_filename",
            "file_containing_symbol",
            "all_extension_numbers_of_type",
            "list_services",
        ),
        "grpc.reflection.v1alpha.ExtensionRequest": ("containing_type",),
    }
    return {f"steering.v1.{name}": limit for name, limit in own.items()} | {
        f"{message}.{name}": Limit(size=_STANDARD) for message, names in standard.items() for name in names
    }


def _characters(count: int) -> int:
    """Most bytes of so many characters in UTF-8."""
    return 4 * count
