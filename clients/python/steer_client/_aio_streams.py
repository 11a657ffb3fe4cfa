"""Streams of the asyncio client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from steer_client._admin import OperatorBuild
from steer_client._results import ABResult, ArmDelta, Generation, PromptResult, TextDelta
from steer_client._streams import StartedCall, Stream
from steer_client._translate import cancelled

Item = TypeVar("Item")
Result = TypeVar("Result")


def task_is_cancelled() -> bool:
    """Whether a CancelledError is meant for the caller's own task.

    grpc.aio raises CancelledError also when only the call was cancelled; the task then lives on and must see an
    ordinary error.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncStream(Stream[Item, Result]):
    """Iterate it once with `async for` for its items, then read `.result`."""

    def __init__(self, call: StartedCall[Item, Result]) -> None:
        super().__init__(call)
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> AsyncIterator[Item]:
        self._begin_iteration()
        return _AsyncItems(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandon()

    def __del__(self) -> None:
        self._abandon_from_any_thread()

    def _abandon_from_any_thread(self) -> None:
        # The garbage collector may run in any thread, and after the loop has ended.
        if not self._is_closed:
            self._is_closed = self._is_cancelled = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._rpc.cancel)

    async def _read_event(self) -> Any:
        try:
            event = await self._rpc.read()
        except asyncio.CancelledError:
            if task_is_cancelled():
                raise
            raise cancelled() from None
        return None if event is grpc.aio.EOF else event

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _AsyncItems(AsyncIterator[Item]):
    # As _sync_streams._Items: grpc.aio leaves a call running when its loop is left.
    def __init__(self, stream: AsyncStream[Item, Any]) -> None:
        self._stream = stream

    async def __anext__(self) -> Item:
        return await self._stream._next_item()

    def __del__(self) -> None:
        self._stream._abandon_from_any_thread()


class AsyncGenerationStream(AsyncStream[TextDelta, Generation]):
    """A text as it is generated: iterate it once with `async for` for TextDelta items, then read `.result`.

    Leaving the loop early, leaving an `async with` block, dropping the stream, cancelling the task and
    `cancel()` all end the request on the server.
    """


class AsyncComparisonStream(AsyncStream[ArmDelta, ABResult]):
    """Every arm's text as it is generated: iterate it once for ArmDelta items, then read `.result`.

    It ends early as an AsyncGenerationStream does.
    """


class AsyncComparisonsStream(AsyncStream[ArmDelta | PromptResult, Mapping[str, ABResult]]):
    """Every text of several prompts: ArmDelta items as they are generated, a PromptResult when a prompt is finished.

    Its `.result` has the results by the prompts' ids. It ends early as an AsyncGenerationStream does.
    """


class AsyncBuildStream(AsyncStream[OperatorBuild, OperatorBuild]):
    """A build as it goes on: iterate it once with `async for`, as a BuildStream."""
