"""The paths of OpenAI's API that this server has."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from steering.v1 import comparison_pb2, generation_pb2

from operators.core.apply import recommended_setting
from operators.core.errors import SettingError
from steer_server.errors import InvalidRequestError
from steer_server.http.contract import admit
from steer_server.http.endpoint import Answer, Events, Value
from steer_server.http.errors import Failure, error_body
from steer_server.http.exchange import event
from steer_server.http.openai.answers import Answers
from steer_server.http.openai.parameters import ChatParameters, CompletionParameters, read_parameters
from steer_server.http.openai.requests import Asked, asked_chat, asked_completion
from steer_server.http.refused import RefusedError
from steer_server.registry import OperatorEntry
from steer_server.rpc.parts import ServerParts

_LAST = b"data: [DONE]\n\n"
_COMPARE: MethodDescriptor = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].methods_by_name["Compare"]


class OpenAIPaths:
    """Handlers over one server."""

    def __init__(self, parts: ServerParts) -> None:
        self._parts = parts
        self._created = int(time.time())
        self._service = parts.services[_COMPARE.containing_service.full_name]

    async def models(self, _body: Any) -> Answer:
        """The model, and behind it each operator that needs nothing else to be said."""
        return Value({"object": "list", "data": [self._model(name) for name in self._names()]})

    async def model(self, name: str) -> Answer:
        """One of :meth:`models`. Raises :class:`RefusedError`."""
        if name not in self._names():
            raise RefusedError(404, "model_not_found", f"there is no model {name[:256]!r}", param="model")
        return Value(self._model(name))

    def read_completion(self, body: Any) -> Asked:
        """Texts that go on from a prompt."""
        return self._admitted(asked_completion(self._parts, read_parameters(CompletionParameters, body)))

    def read_chat(self, body: Any) -> Asked:
        """The next turn of a conversation."""
        return self._admitted(asked_chat(self._parts, read_parameters(ChatParameters, body)))

    def _admitted(self, asked: Asked) -> Asked:
        try:
            return replace(asked, message=admit(self._parts, _COMPARE, asked.message))
        except InvalidRequestError as error:
            raise asked.renamed(error) from None

    async def answer(self, asked: Asked) -> Answer:
        """What was asked for, whole or in pieces."""
        answers = Answers(asked, self._parts.model.model_fingerprint)
        headers = (("x-request-id", asked.request_id),)
        if asked.streams:
            pieces = self._renamed(asked, answers.pieces(self._events(asked)))
            return Events(pieces, headers, last=_LAST, failed=_failed)
        try:
            return Value(await answers.whole(self._events(asked)), headers)
        except InvalidRequestError as error:
            raise asked.renamed(error) from None

    async def _events(self, asked: Asked) -> AsyncGenerator[comparison_pb2.CompareEvent, None]:
        async with aclosing(self._service.Compare(asked.message, None)) as events:
            async for each in events:
                yield each

    async def _renamed(self, asked: Asked, pieces: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    yield event(piece)
        except InvalidRequestError as error:
            raise asked.renamed(error) from None

    def _names(self) -> list[str]:
        model = self._parts.model.model
        return [model, *(f"{model}+{entry.name}" for entry in self._parts.registry.entries() if _is_complete(entry))]

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "steering-operators",
            "max_model_len": self._parts.model.context_length,
        }


def _is_complete(entry: OperatorEntry) -> bool:
    """Whether an operator's name alone says how to steer: it can be used, is no lens, and recommends a strength."""
    if entry.artifact is None or entry.artifact.header.lens is not None:
        return False
    try:
        recommended_setting(entry.artifact.header)
    except SettingError:
        return False
    return True


def _failed(error: Failure) -> bytes:
    """The last event of a stream that failed, as OpenAI's clients know it."""
    return event(error_body(error))
