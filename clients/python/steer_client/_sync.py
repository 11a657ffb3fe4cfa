"""The blocking client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


class SyncStream(StreamState[Item, Result]):
    def __init__(
        self,
        call: Any,
        reducer: Reducer[Item, Result],
        fail: Callable[[grpc.RpcError], SteerError],
    ) -> None:
        super().__init__(call, reducer)
        self._fail = fail

    def __iter__(self) -> Iterator[Item]:
        self._claim()
        return _Items(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandon()

    def __del__(self) -> None:
        self._abandon()

    def _next(self) -> Item:
        if self._cancelled:
            raise cancelled()
        if self._closed:
            raise StopIteration
        try:
            for event in self._call:
                item = self._reducer.feed(event)
                if item is not None:
                    return item
            self._end()
        except grpc.RpcError as error:
            self._closed = True
            raise self._fail(error) from error
        except BaseException:
            self._abandon()
            raise
        raise StopIteration


class _Items(Iterator[Item]):
    # A loop that is left by `break` or by an exception drops this object, while the stream itself may live on
    # in a variable; so it is this object's end that ends the call.
    def __init__(self, stream: SyncStream[Item, Any]) -> None:
        self._stream = stream

    def __next__(self) -> Item:
        return self._stream._next()

    def __del__(self) -> None:
        self._stream._abandon()


class GenerationStream(SyncStream[TextDelta, Generation]):
    """A text as it comes: iterate it once for TextDelta items, then read `.result`.

    Leaving the loop early, leaving a `with` block, dropping the stream and `cancel()` all end the request on
    the server.
    """


class ComparisonStream(SyncStream[ArmDelta, ABResult]):
    """Every arm's text as it comes: iterate it once for ArmDelta items, then read `.result`.

    It ends early as a GenerationStream does.
    """


class SteerClient:
    """A blocking client, for use from any number of threads; close it, or use it as a context manager.

    `target` is HOST:PORT, by default the environment's STEER_TARGET, else 127.0.0.1:50051. Several servers are
    ipv4:HOST:PORT,HOST:PORT or dns:///NAME:PORT: requests go to them in turn, leaving out those that do not
    serve, and one that a server did not begin to answer goes to the next. `timeout` is in seconds, for a whole
    call with its stream; None waits for ever; every method takes its own. The channel is plaintext unless
    `credentials` are given.

    Every method raises a SteerError: InvalidRequestError before anything is sent when a value does not fit
    the contract, SteeringNotAppliedError when an answer lacks the receipts of its operators, else what the
    server reports.
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
        options = calls.channel_options(self.target)
        if credentials is None:
            self._channel = grpc.insecure_channel(self.target, options=options)
        else:
            self._channel = grpc.secure_channel(self.target, credentials, options=options)
        self._stubs = calls.Stubs(self._channel)
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is under way and closes the connection."""
        self._is_closed = True
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        operators: Sequence[OperatorUse] = (),
        sampling: SamplingParams = SERVER_DEFAULTS,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> Generation:
        """Decodes one prompt and waits for its end. No operators: a plain text."""
        return self._unary(calls.generate(prompt, operators, sampling, request_id), timeout)

    def stream(
        self,
        prompt: Prompt,
        *,
        operators: Sequence[OperatorUse] = (),
        sampling: SamplingParams = SERVER_DEFAULTS,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> GenerationStream:
        """As `generate`, piece by piece; the server's errors are raised while the stream is read."""
        call = calls.stream(prompt, operators, sampling, request_id)
        return GenerationStream(*self._start(call, timeout))

    def compare(
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
        for _ in stream:
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
    ) -> ComparisonStream:
        """As `compare`, piece by piece; the arms' pieces interleave."""
        call = calls.compare(prompt, operators, arms, sampling, request_id, score)
        return ComparisonStream(*self._start(call, timeout))

    def operators(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> tuple[OperatorInfo, ...]:
        """Every operator in the server's store, the unusable ones with their problem."""
        return self._unary(calls.list_operators(), timeout)

    def operator(self, name: str, *, timeout: Timeout = CLIENT_TIMEOUT) -> OperatorInfo:
        """One operator. Raises UnknownOperatorError."""
        return self._unary(calls.get_operator(name), timeout)

    def reload_operators(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> ReloadReport:
        """Makes the server read its store again; requests under way keep what they started with.

        One server at a time: a target that may stand for several is an InvalidRequestError.
        """
        return self._unary(calls.reload_operators(self.target), timeout)

    def model_info(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> ModelInfo:
        """The model, its limits and the engine that serves it."""
        return self._unary(calls.model_info(), timeout)

    def tokenize(self, prompt: Prompt, *, timeout: Timeout = CLIENT_TIMEOUT) -> Tokenization:
        """The prompt as it reaches the model."""
        return self._unary(calls.tokenize(prompt), timeout)

    def health(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> bool:
        """Whether the server takes requests. Raises ServerUnavailableError when nobody answers.

        Of several servers, one that takes requests answers; it is raised when there is none.
        """
        return self._unary(calls.health(), timeout)

    def _unary(self, call: calls.Unary[Result], timeout: Timeout) -> Result:
        seconds = self._seconds(timeout)
        try:
            answer = self._stubs.method(call.service, call.method)(call.request, timeout=seconds)
        except grpc.RpcError as error:
            raise translate(error, target=self.target, timeout=seconds) from error
        return call.decode(answer)

    def _start(
        self, call: calls.Streaming[Item, Result], timeout: Timeout
    ) -> tuple[Any, Reducer[Item, Result], Callable[[grpc.RpcError], SteerError]]:
        seconds = self._seconds(timeout)
        rpc = self._stubs.method("generation", call.method)(call.request, timeout=seconds)
        return rpc, call.reducer, lambda error: translate(error, target=self.target, timeout=seconds)

    def _seconds(self, timeout: Timeout) -> float | None:
        if self._is_closed:
            raise RuntimeError("the client is closed")
        return self._timeout if timeout is CLIENT_TIMEOUT else encode.seconds(timeout)
