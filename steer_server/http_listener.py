"""The sockets of the door: connections are taken one by one, so that those which shake hands are bounded too.

Each takes the certificate that is there when it begins.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

_BACKLOG = 128
_PAUSE_SECONDS = 0.5
"""After a connection that could not be taken: where too many files are open, the next cannot be either."""


class HttpListener:
    """Belongs to one event loop."""

    def __init__(
        self,
        connect: Callable[[], asyncio.Protocol],
        context: Callable[[], ssl.SSLContext | None],
        has_room: Callable[[int], bool],
        *,
        handshake: float,
    ) -> None:
        """
        Args:
            connect: makes the protocol of a connection.
            context: of TLS, for the next connection; None without TLS.
            has_room: whether there may be one more, where so many shake hands.
            handshake: seconds that it may take.
        """
        self._connect, self._context, self._has_room, self._handshake = connect, context, has_room, handshake
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._shaking: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listens, and returns the port. Raises :class:`OSError`."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, kind, protocol, _, address in dict.fromkeys(found):
                made = socket.socket(family, kind, protocol)
                self._sockets.append(made)
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                made.bind(address)
                made.listen(_BACKLOG)
                made.setblocking(False)
        except OSError:
            self.close()
            raise
        self._accepting = [asyncio.ensure_future(self._accept(each)) for each in self._sockets]
        return int(self._sockets[0].getsockname()[1])

    def close(self) -> None:
        """Takes no more connections; those that were taken stay."""
        for task in (*self._accepting, *self._shaking):
            task.cancel()
        for each in self._sockets:
            each.close()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError:
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            if not self._has_room(len(self._shaking)):
                accepted.close()
                continue
            task = asyncio.ensure_future(self._begin(accepted))
            self._shaking.add(task)
            task.add_done_callback(self._shaking.discard)

    async def _begin(self, accepted: socket.socket) -> None:
        loop, context = asyncio.get_running_loop(), self._context()
        timeout = None if context is None else self._handshake
        try:
            await loop.connect_accepted_socket(self._connect, accepted, ssl=context, ssl_handshake_timeout=timeout)
        except OSError:
            # Of one who speaks no TLS, has no certificate, or has left; asyncio has closed the socket.
            accepted.close()
