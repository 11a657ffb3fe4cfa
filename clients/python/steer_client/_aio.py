"""The asyncio client."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self, TypeVar

import grpc

from steer_client._aio_streams import AsyncStream, task_is_cancelled
from steer_client._calls import Unary
from steer_client._channel import Stubs, channel_options
from steer_client._defaults import Timeout
from steer_client._dual_method import Asynchronous
from steer_client._errors import SteerError
from steer_client._methods import Methods
from steer_client._pool import TaskPool
from steer_client._retry import Retries
from steer_client._streams import StartedCall
from steer_client._translate import cancelled

Item = TypeVar("Item")
Result = TypeVar("Result")


class AsyncSteerClient(Methods, Asynchronous):
    """An asyncio client for one event loop at a time; close it, or use it as an async context manager.

    Parameters and errors are those of SteerClient. `stream` and `compare_stream` are not awaited: they
    start the call at once and return a stream to iterate.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _connect(self) -> None:
        # The channel itself opens on first use, because a grpc.aio channel belongs to the loop that runs when it is
        # made.
        self._channel: grpc.aio.Channel | None = None
        self._open_stubs: Stubs | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def _pool(self) -> TaskPool:
        return TaskPool()

    def _stubs(self) -> Stubs:
        running = asyncio.get_running_loop()
        if self._open_stubs is not None and self._loop is not running:
            if self._loop is not None and not self._loop.is_closed():
                raise SteerError("this client is in use on another event loop; make one for each")
            # Of an earlier asyncio.run: what it opened has ended with its loop.
            self._open_stubs = self._channel = None
        if self._open_stubs is None:
            self._loop = running
            options, credentials = channel_options(self.target, self._access.server_name), self._access.credentials
            if credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, options=options)
            else:
                self._channel = grpc.aio.secure_channel(self.target, credentials, options=options)
            self._open_stubs = Stubs(self._channel, self._access.metadata.of_call)
        return self._open_stubs

    async def _disconnect(self) -> None:
        if self._channel is not None and self._loop is asyncio.get_running_loop():
            await self._channel.close()

    async def _answer(self, call: Unary[Result], timeout: Timeout) -> Result:
        seconds = self._seconds(timeout)
        send, retries = self._stubs().method(call.service, call.method), Retries(seconds, enabled=self._retry)
        while True:
            try:
                answer = await send(call.sent, timeout=retries.timeout)
            except grpc.RpcError as error:
                failure = self._translate(error, timeout=seconds)
                pause = retries.pause_after(failure)
                if pause is None:
                    raise failure from error
                await asyncio.sleep(pause)
                continue
            except asyncio.CancelledError:
                if task_is_cancelled():
                    raise
                raise cancelled() from None
            return call.decode(answer)

    async def _read_to_end(self, call: StartedCall[Item, Result]) -> Result:
        stream = AsyncStream(call)
        async for _ in stream:
            pass
        return stream.result
