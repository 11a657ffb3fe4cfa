"""An HTTP server for a few short answers, and the probes; bounded in connections, bytes and time."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping

from steer_server.http_listener import HttpListener
from steer_server.lifecycle import PATHS, Lifecycle

_MAX_CONNECTIONS = 32
_MAX_HEAD_BYTES = 16 << 10
_SECONDS = 5.0
"""For a whole exchange."""
TEXT = "text/plain; charset=utf-8"
Answer = tuple[str, str, bytes]
"""Status line, type and body."""


class SmallHttp:
    """Answers GET of the probes, and of the paths that it is given, on the event loop that starts it."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        paths: Mapping[str, Callable[[str], Awaitable[Answer]]],
        *,
        other: Answer | None = None,
    ) -> None:
        """``paths``: each makes its answer, of the header Accept. ``other``: of any other path and method."""
        self._lifecycle, self._paths, self._other = lifecycle, paths, other
        self._open = 0

    async def start(self, host: str, port: int, context: ssl.SSLContext | None = None) -> int:
        """Listens, and returns the port. Raises :class:`OSError` where that is not possible."""
        # Bounded from the moment that a connection is taken: its handshake is a part of it.
        self._listener = HttpListener(
            lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader(limit=_MAX_HEAD_BYTES), self._serve),
            lambda: context,
            lambda shaking: shaking + self._open < _MAX_CONNECTIONS,
            handshake=_SECONDS,
        )
        return await self._listener.start(host, port)

    def close(self) -> None:
        """Stops listening."""
        self._listener.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= _MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._open += 1
        try:
            async with asyncio.timeout(_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_response(*await self._answer(head), has_body=not head.startswith(b"HEAD ")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            writer.transport.abort()
        finally:
            self._open -= 1

    async def _answer(self, head: bytes) -> Answer:
        request, *headers = head.decode("latin-1").split("\r\n")
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if path not in (*PATHS, *self._paths):
            there = f"there are {', '.join((*self._paths, *PATHS))}\n".encode()
            return self._other or ("404 Not Found", TEXT, there)
        if method not in ("GET", "HEAD"):
            return "405 Method Not Allowed", TEXT, b"GET and HEAD are accepted\n"
        if path in PATHS:
            return probe(self._lifecycle, path)
        accepts = (line.partition(":")[2].strip() for line in headers if line.lower().startswith("accept:"))
        return await self._paths[path](",".join(accepts))


def probe(lifecycle: Lifecycle, path: str) -> Answer:
    """The answer to one of :data:`PATHS`."""
    if lifecycle.holds(PATHS[path]):
        return "200 OK", TEXT, b"ok\n"
    return "503 Service Unavailable", TEXT, f"{lifecycle.state.value}\n".encode()


def _response(status: str, kind: str, body: bytes, *, has_body: bool) -> bytes:
    extra = "Retry-After: 5\r\n" if status.startswith("503") else ""
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}Connection: close\r\n\r\n"
    )
    return head.encode() + (body if has_body else b"")
