"""Every method of the contract at /api/METHOD, its messages as JSON.

A method with one answer answers with one JSON object, a method with many with server-sent events. A method that takes
many messages has no place here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from steer_server.http.endpoint import Answer, Events, Handler, Value
from steer_server.http.exchange import event
from steer_server.http.messages import read_message, to_json
from steer_server.rpc.parts import ServerParts

_M = TypeVar("_M", bound=Message)


def contract_methods(parts: ServerParts, pool: DescriptorPool) -> dict[str, Handler]:
    """What handles each method of the contract, by its full name."""
    return {
        full_name(method): _handler(parts, method, getattr(service, method.name))
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


def _handler(parts: ServerParts, method: MethodDescriptor, behaviour: Callable[[Any, Any], Any]) -> Handler:
    cls = GetMessageClass(method.input_type)

    async def one(body: Any) -> Answer:
        return Value(to_json(await behaviour(admit(parts, method, read_message(cls, body)), None)))

    async def many(body: Any) -> Answer:
        return Events(_events(behaviour(admit(parts, method, read_message(cls, body)), None)))

    return many if method.server_streaming else one


async def _events(messages: AsyncGenerator[Message, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(messages):
        async for message in messages:
            yield event(to_json(message))
