"""Streams of the blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from steer_client._admin import OperatorBuild
from steer_client._dual_method import run_to_end
from steer_client._results import ABResult, ArmDelta, Generation, PromptResult, TextDelta
from steer_client._streams import Stream

Item = TypeVar("Item")
Result = TypeVar("Result")


class SyncStream(Stream[Item, Result]):
    """Iterate it once for its items, then read `.result`."""

    def __iter__(self) -> Iterator[Item]:
        self._begin_iteration()
        return _Items(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandon()

    def __del__(self) -> None:
        self._abandon()

    async def _read_event(self) -> Any:
        return next(self._rpc, None)

    async def _pause(self, seconds: float) -> None:
        time.sleep(seconds)


class _Items(Iterator[Item]):
    # A loop that is left by `break` or by an exception drops this iterator, while the stream itself may live on in a
    # variable. So the end of the iterator ends the call.
    def __init__(self, stream: SyncStream[Item, Any]) -> None:
        self._stream = stream

    def __next__(self) -> Item:
        try:
            return run_to_end(self._stream._next_item())
        except StopAsyncIteration:
            raise StopIteration from None

    def __del__(self) -> None:
        self._stream._abandon()


class GenerationStream(SyncStream[TextDelta, Generation]):
    """A text as it is generated: iterate it once for TextDelta items, then read `.result`.

    Leaving the loop early, leaving a `with` block, dropping the stream and `cancel()` all end the request on
    the server.
    """


class ComparisonStream(SyncStream[ArmDelta, ABResult]):
    """Every arm's text as it is generated: iterate it once for ArmDelta items, then read `.result`.

    It ends early as a GenerationStream does.
    """


class ComparisonsStream(SyncStream[ArmDelta | PromptResult, Mapping[str, ABResult]]):
    """Every text of several prompts: ArmDelta items as they are generated, a PromptResult when a prompt is finished.

    Its `.result` has the results by the prompts' ids. It ends early as a GenerationStream does.
    """


class BuildStream(SyncStream[OperatorBuild, OperatorBuild]):
    """A build as it goes on: iterate it once for OperatorBuild items, whose last one is its end and the `.result`.

    To leave it ends nothing but the watching.
    """
