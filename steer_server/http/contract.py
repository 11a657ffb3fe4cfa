"""Every method of the contract at /api/METHOD, its messages as JSON.

A method with one answer answers with one JSON object, a method with many with server-sent events. A method that takes
many messages has no place here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from steer_server.http.endpoint import Answer, Events, Handler, Read, Value
from steer_server.http.exchange import event
from steer_server.http.messages import read_message, to_json
from steer_server.rpc.parts import ServerParts

_M = TypeVar("_M", bound=Message)


@dataclass(frozen=True)
class Method:
    """How a body becomes a message, and the message an answer."""

    read: Read
    handle: Handler


def contract_methods(parts: ServerParts, pool: DescriptorPool) -> dict[str, Method]:
    """Each method of the contract, by its full name."""
    return {
        full_name(method): _method(parts, method, getattr(service, method.name))
        for name, service in parts.services.items()
        for method in pool.FindServiceByName(name).methods
        if not method.client_streaming
    }


def full_name(method: MethodDescriptor) -> str:
    """ "/service/method", as calls name it."""
    return f"/{method.containing_service.full_name}/{method.name}"


def admit(parts: ServerParts, method: MethodDescriptor, given: _M) -> _M:
    """A request, measured as if it had come over gRPC. Raises :class:`InvalidRequestError`."""
    admitted: _M = parts.admission.read(full_name(method), given.SerializeToString(), type(given).FromString)
    return admitted


def _method(parts: ServerParts, method: MethodDescriptor, behaviour: Callable[[Any, Any], Any]) -> Method:
    cls = GetMessageClass(method.input_type)

    def read(body: Any) -> Message:
        return admit(parts, method, read_message(cls, body))

    async def one(message: Message) -> Answer:
        return Value(to_json(await behaviour(message, None)))

    async def many(message: Message) -> Answer:
        return Events(_events(behaviour(message, None)))

    return Method(read, many if method.server_streaming else one)


async def _events(messages: AsyncGenerator[Message, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(messages):
        async for message in messages:
            yield event(to_json(message))
