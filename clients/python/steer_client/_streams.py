"""What a blocking and an asyncio stream have in common: the call, its state, and how its events become items."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc

from steer_client._errors import SteerError
from steer_client._events import Reducer
from steer_client._retry import Retries
from steer_client._translate import cancelled

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StartedCall(Generic[Item, Result]):
    """One streaming RPC: how it is sent, how its events are read, and how its failure is met."""

    #: Sends it, within `timeout=` seconds.
    send: Callable[..., Any]
    reducer: Reducer[Item, Result]
    translate_error: Callable[[grpc.RpcError], SteerError]
    retries: Retries


class Stream(ABC, Generic[Item, Result]):
    """One RPC whose events become items, and whose end becomes a result."""

    def __init__(self, call: StartedCall[Item, Result]) -> None:
        # No more events will be read: the RPC has ended, was abandoned (then it is also cancelled), or was never sent.
        self._is_closed = True
        self._send, self._retries = call.send, call.retries
        self._rpc = call.send(timeout=call.retries.timeout)
        self._is_closed = False
        self._has_begun = False
        self._reducer = call.reducer
        self._translate_error = call.translate_error
        self._is_iterated = False
        self._is_cancelled = False
        self._result: Result | None = None

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt as it reached the model. Raises RuntimeError until the first item was read."""
        if self._reducer.prompt_token_ids is None:
            raise RuntimeError("the prompt's token ids arrive with the stream: read it first")
        return self._reducer.prompt_token_ids

    @property
    def result(self) -> Result:
        """The whole result. Raises RuntimeError until the stream was read to its end."""
        if self._result is None:
            raise RuntimeError("a stream has its result only when it was read to its end")
        return self._result

    def cancel(self) -> None:
        """Ends the call on the server. Reading on raises RequestCancelledError."""
        self._abandon()

    @abstractmethod
    async def _read_event(self) -> Any:
        """The next event of the RPC, None at its end. On a blocking stream it never suspends."""

    async def _next_item(self) -> Item:
        """The next item. Raises StopAsyncIteration at the end, else a SteerError."""
        if self._is_cancelled:
            raise cancelled()
        if self._is_closed:
            raise StopAsyncIteration
        try:
            while (event := await self._next_event()) is not None:
                item = self._reducer.feed(event)
                if item is not None:
                    return item
            self._finish()
        except grpc.RpcError as error:
            self._is_closed = True
            raise self._translate_error(error) from error
        except BaseException:
            self._abandon()
            raise
        raise StopAsyncIteration

    async def _next_event(self) -> Any:
        """The next event; where the server refuses the call before its first one, that of the call sent again."""
        while True:
            try:
                event = await self._read_event()
            except grpc.RpcError as error:
                pause = None if self._has_begun else self._retries.pause_after(self._translate_error(error))
                if pause is None:
                    raise
                await self._pause(pause)
                if not self._is_cancelled:
                    self._rpc = self._send(timeout=self._retries.timeout)
                if self._is_cancelled:
                    # Perhaps by another thread while it was sent, which could cancel the earlier call only.
                    self._rpc.cancel()
                    raise cancelled() from None
                continue
            self._has_begun = True
            return event

    @abstractmethod
    async def _pause(self, seconds: float) -> None:
        """Waits. On a blocking stream it never suspends."""

    def _begin_iteration(self) -> None:
        if self._is_iterated:
            raise RuntimeError("a stream can be read only once")
        self._is_iterated = True

    def _abandon(self) -> None:
        if not self._is_closed:
            self._is_closed = self._is_cancelled = True
            self._rpc.cancel()

    def _finish(self) -> None:
        self._is_closed = True
        self._result = self._reducer.finish()
