"""A method that is written once and works on the blocking and on the asyncio client.

Each method of `_methods` is a coroutine: the asyncio client hands it out as it is, and on the blocking client, whose
transport never suspends, `DualMethod` runs it to its end and returns its result. So a signature, a docstring and the
logic stand in one place, for a method that sends one request as for one that sends many and decides between them; a
second, generated module would keep such logic too, but repeat every line and need a tool and a check of its own.
Type checkers see the precise signature on each client by the overloads of `__get__`, and `help()` by real functions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

P = ParamSpec("P")
Call = TypeVar("Call")
Result = TypeVar("Result")
OnBlocking = TypeVar("OnBlocking", covariant=True)
OnAsync = TypeVar("OnAsync", covariant=True)


class Blocking:
    """Base of the client whose methods return their results."""


class Asynchronous:
    """Base of the client whose methods return coroutines of their results."""


class DualMethod(Generic[P, OnBlocking, OnAsync]):
    """One function for each kind of client, with the same parameters; looking it up chooses by the client's class."""

    def __init__(
        self,
        on_blocking: Callable[Concatenate[Any, P], OnBlocking],
        on_async: Callable[Concatenate[Any, P], OnAsync],
    ) -> None:
        self._on_blocking = on_blocking
        self._on_async = on_async
        # For tools that read class dictionaries, such as pydoc.
        self.__doc__ = on_async.__doc__

    @overload
    def __get__(self, client: Blocking, owner: type) -> Callable[P, OnBlocking]: ...
    @overload
    def __get__(self, client: Asynchronous, owner: type) -> Callable[P, OnAsync]: ...
    @overload
    def __get__(self, client: None, owner: type[Blocking]) -> Callable[Concatenate[Any, P], OnBlocking]: ...
    @overload
    def __get__(self, client: None, owner: type[Asynchronous]) -> Callable[Concatenate[Any, P], OnAsync]: ...
    def __get__(self, client: object, owner: type) -> object:
        function: Any = self._on_blocking if issubclass(owner, Blocking) else self._on_async
        return function.__get__(client, owner)


def method(
    coroutine_function: Callable[Concatenate[Any, P], Coroutine[Any, Any, Result]],
) -> DualMethod[P, Result, Coroutine[Any, Any, Result]]:
    """Decorates a coroutine function; the blocking client's version returns its result."""

    @functools.wraps(coroutine_function)
    def on_blocking(client: Any, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        return run_to_end(coroutine_function(client, *args, **kwargs))

    return DualMethod(on_blocking, coroutine_function)


def stream_method(
    blocking_stream: Callable[[Call], OnBlocking], async_stream: Callable[[Call], OnAsync]
) -> Callable[[Callable[Concatenate[Any, P], Call]], DualMethod[P, OnBlocking, OnAsync]]:
    """Decorates a function that starts a call; each client's version returns that call as its kind of stream."""

    def decorate(start: Callable[Concatenate[Any, P], Call]) -> DualMethod[P, OnBlocking, OnAsync]:
        return DualMethod(_wrapped(start, blocking_stream), _wrapped(start, async_stream))

    return decorate


def _wrapped(
    start: Callable[Concatenate[Any, P], Call], stream: Callable[[Call], Result]
) -> Callable[Concatenate[Any, P], Result]:
    @functools.wraps(start)
    def started(client: Any, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        return stream(start(client, *args, **kwargs))

    # `wraps` copied the annotations of `start`; what is returned here is the stream.
    returned = stream.__name__
    started.__annotations__ = start.__annotations__ | {"return": returned}
    cast("Any", started).__signature__ = inspect.signature(start).replace(return_annotation=returned)
    return started


def run_to_end(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine that never suspends. Raises RuntimeError for one that does."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return cast("Result", end.value)
    coroutine.close()
    raise RuntimeError("a method of the blocking client awaited something that suspends")
