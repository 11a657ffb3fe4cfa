"""One request and its answer on the wire: read within bounds of size and time, written as fast as the client reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Receive, Scope, Send

from steer_server.access.grant import Grant
from steer_server.caller import Caller, holder_of
from steer_server.errors import SlowReaderError
from steer_server.http.bodies import HeldRoom
from steer_server.http.errors import Failure
from steer_server.http.refused import RefusedError

_CHUNK = 64 << 10
_DISCARDED = 4
"""A body of up to so many times the largest is read to its end before it is refused: its client hears why."""
_EVENTS = [("content-type", "text/event-stream"), ("cache-control", "no-store"), ("x-accel-buffering", "no")]
_JSON = [("content-type", "application/json"), ("cache-control", "no-store")]


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


def peer_of(scope: Scope) -> str:
    """Who is at the other end of a connection, as gRPC names it."""
    host, port = scope["client"] or ("", 0)
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


def authorization_of(scope: Scope) -> list[str | bytes]:
    """What came under that name, once or several times."""
    return [value for name, value in scope["headers"] if name == b"authorization"]


class Exchange:
    """What ASGI gives of one request."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, patience: float) -> None:
        """``patience``: seconds for each piece of the answer to be taken."""
        self._scope, self._receive, self._send, self._patience = scope, receive, send, patience
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        """By their names in lower case."""
        self.has_begun = False
        """Whether something of an answer was written."""
        self.failed: Callable[[Failure], bytes] = lambda _: b""
        """The last of a stream that fails amid it."""

    @property
    def peer(self) -> str:
        """As gRPC names it."""
        return peer_of(self._scope)

    @property
    def authorization(self) -> list[str | bytes]:
        """What came under that name, once or several times."""
        return authorization_of(self._scope)

    def caller(self, grant: Grant) -> Caller:
        """Whom the work is for, and what may be done."""
        return Caller(holder_of(self.peer, grant), self.peer, None, grant)

    async def read(self, max_bytes: int, room: HeldRoom) -> bytes:
        """The body, which takes its ``room`` as it comes.

        Raises:
            QueueFullError: there is no room for it.
            RefusedError: it is no JSON by its head, is compressed, or is larger than ``max_bytes``.
            ClientLeftError: it will not.
        """
        kind = self.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise RefusedError(
                415,
                "CONTENT_TYPE",
                f"the content type is {kind[:100]!r}; application/json is accepted",
                param="Content-Type",
            )
        coding = self.headers.get("content-encoding", "identity").strip()
        if coding.lower() not in {"", "identity"}:
            raise RefusedError(
                415,
                "CONTENT_ENCODING",
                f"the body is encoded as {coding[:100]!r}; it is accepted as it is, without Content-Encoding",
                headers=(("accept-encoding", "identity"),),
                param="Content-Encoding",
            )
        try:
            declared = int(self.headers.get("content-length", "0"))
        except ValueError:
            declared = 0
        if declared > max_bytes and "expect" in self.headers:
            raise _too_large(max_bytes)
        return await self._body(max_bytes, room)

    async def _body(self, max_bytes: int, room: HeldRoom) -> bytes:
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientLeftError
            piece = message.get("body", b"")
            size += len(piece)
            if size <= max_bytes:
                room.take(len(piece))
                pieces.append(piece)
            else:
                pieces.clear()
            is_whole = not message.get("more_body", False)
            if size > max_bytes and (is_whole or size > _DISCARDED * max_bytes):
                raise _too_large(max_bytes)
            if is_whole:
                return b"".join(pieces)

    @asynccontextmanager
    async def while_connected(self) -> AsyncIterator[None]:
        """Cancels the block when the client leaves, which then ends in :class:`ClientLeftError`."""
        task = asyncio.current_task()
        has_left = False

        async def watch() -> None:
            nonlocal has_left
            while (await self._receive())["type"] != "http.disconnect":
                pass
            has_left = True
            if task is not None:
                task.cancel()

        watching = asyncio.ensure_future(watch())
        try:
            yield
        except asyncio.CancelledError:
            if has_left and (task is None or task.uncancel() == 0):
                raise ClientLeftError from None
            raise
        finally:
            watching.cancel()

    async def answer(self, body: Any, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> None:
        """Sends one JSON value. Raises :class:`SlowReaderError`."""
        data = encode(body)
        length = ("content-length", str(len(data)))
        await self._begin(status, [*_JSON, length, *headers])
        for at in range(0, len(data), _CHUNK):
            await self._write(data[at : at + _CHUNK], more=at + _CHUNK < len(data))

    async def stream(self, events: AsyncGenerator[bytes, None], headers: Iterable[tuple[str, str]] = ()) -> None:
        """Sends events as they come, once the first is there. Raises :class:`SlowReaderError`."""
        async for event in events:
            if not self.has_begun:
                await self._begin(200, [*_EVENTS, *headers])
            await self._write(event, more=True)

    async def end(self, last: bytes = b"") -> None:
        """Ends a stream."""
        await self._write(last, more=False)

    def abort(self) -> None:
        """Ends the connection, and drops what its client has not read."""
        self._scope["state"]["abort"]()

    async def _begin(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.has_begun = True
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await self._timed({"type": "http.response.start", "status": status, "headers": encoded})

    async def _write(self, body: bytes, *, more: bool) -> None:
        await self._timed({"type": "http.response.body", "body": body, "more_body": more})

    async def _timed(self, message: dict[str, Any]) -> None:
        # Waits where the socket takes no more: that is, where the client does not read.
        try:
            async with asyncio.timeout(self._patience):
                await self._send(message)
        except TimeoutError:
            raise SlowReaderError(self._patience) from None


def encode(value: Any) -> bytes:
    """A value as JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def event(value: Any, name: str = "") -> bytes:
    """A server-sent event with a JSON value."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + encode(value) + b"\n\n"


def _too_large(max_bytes: int) -> RefusedError:
    message = f"the body is larger than {max_bytes} bytes, the most accepted"
    return RefusedError(413, "REQUEST_TOO_LARGE", message, headers=(("connection", "close"),))
