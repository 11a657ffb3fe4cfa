"""What a sync and an async stream have in common: its state, once the events are read."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from steer_client._events import Reducer

Item = TypeVar("Item")
Result = TypeVar("Result")


class StreamState(Generic[Item, Result]):
    """One RPC whose events become items, and whose end becomes a result."""

    def __init__(self, call: Any, reducer: Reducer[Item, Result]) -> None:
        self._call = call
        self._reducer = reducer
        self._iterated = False
        # No more events are wanted: the call has ended, or was given up (then it is also cancelled).
        self._closed = False
        self._cancelled = False
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

    def _claim(self) -> None:
        if self._iterated:
            raise RuntimeError("a stream can be read only once")
        self._iterated = True

    def _abandon(self) -> None:
        if not self._closed:
            self._closed = self._cancelled = True
            self._call.cancel()

    def _end(self) -> None:
        self._closed = True
        self._result = self._reducer.finish()
