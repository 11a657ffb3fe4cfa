"""The asyncio client: the same calls, awaited."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from steer_client import _calls as calls
from steer_client import _encode as encode
from steer_client._calls import CLIENT_TIMEOUT, Timeout
from steer_client._errors import SteerError
from steer_client._events import Reducer
from steer_client._requests import SERVER_DEFAULTS, OperatorUse, Prompt, SamplingParams
from steer_client._results import (
    ABResult,
    ArmDelta,
    Generation,
    ModelInfo,
    TextDelta,
    Tokenization,
)
from steer_client._store import OperatorInfo, ReloadReport
from steer_client._streams import StreamState
from steer_client._translate import cancelled, translate

Item = TypeVar("Item")
Result = TypeVar("Result")


def _task_is_cancelled() -> bool:
    # grpc.aio raises CancelledError also when only the call was cancelled; the caller's task then lives on
    # and must see an ordinary error.
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _AsyncStream(StreamState[Item, Result]):
    def __init__(
        self,
        call: Any,
        reducer: Reducer[Item, Result],
        fail: Callable[[grpc.RpcError], SteerError],
    ) -> None:
        super().__init__(call, reducer)
        self._fail = fail
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> AsyncIterator[Item]:
        self._claim()
        return _AsyncItems(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandon()

    def __del__(self) -> None:
        self._collected()

    def _collected(self) -> None:
        # The collector may run in any thread, and after the loop has ended.
        if not self._closed:
            self._closed = self._cancelled = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._call.cancel)

    async def _next(self) -> Item:
        if self._cancelled:
            raise cancelled()
        if self._closed:
            raise StopAsyncIteration
        try:
            while (event := await self._call.read()) is not grpc.aio.EOF:
                item = self._reducer.feed(event)
                if item is not None:
                    return item
            self._end()
        except grpc.RpcError as error:
            self._closed = True
            raise self._fail(error) from error
        except asyncio.CancelledError:
            self._abandon()
            if _task_is_cancelled():
                raise
            raise cancelled() from None
        except BaseException:
            self._abandon()
            raise
        raise StopAsyncIteration


class _AsyncItems(AsyncIterator[Item]):
    # See _sync._Items: grpc.aio leaves a call running when its loop is left.
    def __init__(self, stream: _AsyncStream[Item, Any]) -> None:
        self._stream = stream

    async def __anext__(self) -> Item:
        return await self._stream._next()

    def __del__(self) -> None:
        self._stream._collected()


class AsyncGenerationStream(_AsyncStream[TextDelta, Generation]):
    """A text as it comes: iterate it once with `async for` for TextDelta items, then read `.result`.

    Leaving the loop early, leaving an `async with` block, dropping the stream, cancelling the task and
    `cancel()` all end the request on the server.
    """


class AsyncComparisonStream(_AsyncStream[ArmDelta, ABResult]):
    """Every arm's text as it comes: iterate it once for ArmDelta items, then read `.result`.

    It ends early as an AsyncGenerationStream does.
    """


class AsyncSteerClient:
    """An asyncio client for one event loop; close it, or use it as an async context manager.

    Parameters and errors are those of SteerClient. `stream` and `compare_stream` are not awaited: they
    start the call at once and give something to iterate.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout: float | None = calls.DEFAULT_TIMEOUT,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.target = calls.target_or_default(target)
        self._timeout = encode.seconds(timeout)
        self._credentials = credentials
        self._channel: grpc.aio.Channel | None = None
        self._stubs: calls.Stubs | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what is under way and closes the connection."""
        self._is_closed = True
        if self._channel is not None:
            await self._channel.close()

    async def generate(
        self,
        prompt: Prompt,
        *,
        operators: Sequence[OperatorUse] = (),
        sampling: SamplingParams = SERVER_DEFAULTS,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> Generation:
        """Decodes one prompt and waits for its end. No operators: a plain text."""
        return await self._unary(calls.generate(prompt, operators, sampling, request_id), timeout)

    def stream(
        self,
        prompt: Prompt,
        *,
        operators: Sequence[OperatorUse] = (),
        sampling: SamplingParams = SERVER_DEFAULTS,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> AsyncGenerationStream:
        """As `generate`, piece by piece; the server's errors are raised while the stream is read."""
        call = calls.stream(prompt, operators, sampling, request_id)
        return AsyncGenerationStream(*self._start(call, timeout))

    async def compare(
        self,
        prompt: Prompt,
        *,
        operators: Sequence[OperatorUse] = (),
        arms: Mapping[str, Sequence[OperatorUse]] | None = None,
        sampling: SamplingParams = SERVER_DEFAULTS,
        score: bool = True,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> ABResult:
        """Decodes one prompt plain and steered, side by side.

        `operators` make one arm named "steered"; `arms` names several. `score` asks for KL and perplexities.
        """
        stream = self.compare_stream(
            prompt,
            operators=operators,
            arms=arms,
            sampling=sampling,
            score=score,
            request_id=request_id,
            timeout=timeout,
        )
        async for _ in stream:
            pass
        return stream.result

    def compare_stream(
        self,
        prompt: Prompt,
        *,
        operators: Sequence[OperatorUse] = (),
        arms: Mapping[str, Sequence[OperatorUse]] | None = None,
        sampling: SamplingParams = SERVER_DEFAULTS,
        score: bool = True,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> AsyncComparisonStream:
        """As `compare`, piece by piece; the arms' pieces interleave."""
        call = calls.compare(prompt, operators, arms, sampling, request_id, score)
        return AsyncComparisonStream(*self._start(call, timeout))

    async def operators(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> tuple[OperatorInfo, ...]:
        """Every operator in the server's store, the unusable ones with their problem."""
        return await self._unary(calls.list_operators(), timeout)

    async def operator(self, name: str, *, timeout: Timeout = CLIENT_TIMEOUT) -> OperatorInfo:
        """One operator. Raises UnknownOperatorError."""
        return await self._unary(calls.get_operator(name), timeout)

    async def reload_operators(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> ReloadReport:
        """Makes the server read its store again; requests under way keep what they started with.

        One server at a time: a target that may stand for several is an InvalidRequestError.
        """
        return await self._unary(calls.reload_operators(self.target), timeout)

    async def model_info(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> ModelInfo:
        """The model, its limits and the engine that serves it."""
        return await self._unary(calls.model_info(), timeout)

    async def tokenize(self, prompt: Prompt, *, timeout: Timeout = CLIENT_TIMEOUT) -> Tokenization:
        """The prompt as it reaches the model."""
        return await self._unary(calls.tokenize(prompt), timeout)

    async def health(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> bool:
        """Whether the server takes requests. Raises ServerUnavailableError when nobody answers.

        Of several servers, one that takes requests answers; it is raised when there is none.
        """
        return await self._unary(calls.health(), timeout)

    async def _unary(self, call: calls.Unary[Result], timeout: Timeout) -> Result:
        seconds = self._seconds(timeout)
        try:
            answer = await self._open().method(call.service, call.method)(call.request, timeout=seconds)
        except grpc.RpcError as error:
            raise translate(error, target=self.target, timeout=seconds) from error
        except asyncio.CancelledError:
            if _task_is_cancelled():
                raise
            raise cancelled() from None
        return call.decode(answer)

    def _start(
        self, call: calls.Streaming[Item, Result], timeout: Timeout
    ) -> tuple[Any, Reducer[Item, Result], Callable[[grpc.RpcError], SteerError]]:
        seconds = self._seconds(timeout)
        rpc = self._open().method("generation", call.method)(call.request, timeout=seconds)
        return rpc, call.reducer, lambda error: translate(error, target=self.target, timeout=seconds)

    def _open(self) -> calls.Stubs:
        # On first use, because a grpc.aio channel belongs to the loop that runs when it is made.
        if self._stubs is None:
            options = calls.channel_options(self.target)
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, options=options)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._credentials, options=options)
            self._stubs = calls.Stubs(self._channel)
        return self._stubs

    def _seconds(self, timeout: Timeout) -> float | None:
        if self._is_closed:
            raise RuntimeError("the client is closed")
        return self._timeout if timeout is CLIENT_TIMEOUT else encode.seconds(timeout)
