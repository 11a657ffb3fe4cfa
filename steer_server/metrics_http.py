"""The metrics over HTTP, and whether the server serves; bounded in connections, bytes and time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

_MAX_CONNECTIONS = 32
_MAX_HEAD_BYTES = 16 << 10
_SECONDS = 5.0
"""For a whole exchange."""
_TEXT = "text/plain; charset=utf-8"
_Answer = tuple[str, str, bytes]


class MetricsServer:
    """Answers GET /metrics and GET /healthz on the event loop that starts it."""

    def __init__(self, registry: CollectorRegistry, is_serving: Callable[[], bool]) -> None:
        self._registry, self._is_serving = registry, is_serving
        self._open = 0

    async def start(self, host: str, port: int) -> int:
        """Listens, and returns the port. Raises :class:`OSError` where that is not possible."""
        self._server = await asyncio.start_server(self._serve, host, port, limit=_MAX_HEAD_BYTES)
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stops listening."""
        self._server.close()

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

    async def _answer(self, head: bytes) -> _Answer:
        request, *headers = head.decode("latin-1").split("\r\n")
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if path not in ("/metrics", "/healthz"):
            return "404 Not Found", _TEXT, b"there are /metrics and /healthz\n"
        if method not in ("GET", "HEAD"):
            return "405 Method Not Allowed", _TEXT, b"GET and HEAD are accepted\n"
        if path == "/healthz":
            return (
                ("200 OK", _TEXT, b"ok\n") if self._is_serving() else ("503 Service Unavailable", _TEXT, b"stopping\n")
            )
        accepts = (line.partition(":")[2].strip() for line in headers if line.lower().startswith("accept:"))
        try:
            encode, kind = choose_encoder(",".join(accepts))
        except (TypeError, ValueError):
            # Of a version that is no number.
            encode, kind = choose_encoder("")
        # Beside the event loop: the engine's own collectors may have much to write.
        return "200 OK", kind, await asyncio.to_thread(encode, self._registry)


def _response(status: str, kind: str, body: bytes, *, has_body: bool) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + (body if has_body else b"")
