"""Methods that are written once: the same on both clients but for what they return."""

import asyncio
import inspect
import os
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
from steer_client import AsyncSteerClient, InvalidRequestError, SteerClient
from steer_client import _calls as calls
from steer_client._defaults import CLIENT_TIMEOUT
from steer_client._dual_method import method

ROOT = Path(__file__).parents[2]
STREAMS = {
    "stream": ("GenerationStream", "AsyncGenerationStream"),
    "compare_stream": ("ComparisonStream", "AsyncComparisonStream"),
    "compare_many_stream": ("ComparisonsStream", "AsyncComparisonsStream"),
    "watch_build": ("BuildStream", "AsyncBuildStream"),
}


def public_methods(client: type) -> dict:
    return {name: value for name, value in inspect.getmembers(client, inspect.isfunction) if name[0] != "_"}


BLOCKING, ASYNC = public_methods(SteerClient), public_methods(AsyncSteerClient)


def test_both_clients_have_the_same_methods():
    assert set(BLOCKING) == set(ASYNC)
    texts = {
        "generate",
        "stream",
        "samples",
        "compare",
        "compare_stream",
        "compare_many",
        "compare_many_stream",
        "score",
        "sweep",
    }
    store = {"operators", "operator", "reload_operators"}
    admin = {"upload_operator", "load_operator", "unload_operator", "delete_operator", "build_operator"}
    admin |= {"watch_build", "wait_for_build", "cancel_build", "builds"}
    assert set(BLOCKING) == texts | store | admin | {"model_info", "tokenize", "health", "close"}


@pytest.mark.parametrize("name", ["__init__", *BLOCKING])
def test_a_method_has_the_same_parameters_defaults_and_docstring_on_both_clients(name):
    first, second = getattr(SteerClient, name), getattr(AsyncSteerClient, name)
    parameters = inspect.signature(first).parameters
    assert list(parameters.values()) == list(inspect.signature(second).parameters.values())
    if name != "__init__":
        assert first.__doc__
    assert first.__doc__ == second.__doc__
    # A sweep's is of each of its requests, which wait for one another at the server: by default there is none.
    # Nor of what takes as long as a file or a build is large.
    endless = ("sweep", "upload_operator", "watch_build", "wait_for_build")
    assert name in ("__init__", "close", *endless) or parameters["timeout"].default is CLIENT_TIMEOUT


@pytest.mark.parametrize("name", BLOCKING)
def test_a_method_gives_its_result_on_one_client_and_a_coroutine_or_a_stream_on_the_other(name):
    first, second = (inspect.signature(methods[name]).return_annotation for methods in (BLOCKING, ASYNC))
    assert (first, second) == STREAMS.get(name, (first, first))
    assert not inspect.iscoroutinefunction(BLOCKING[name])
    assert inspect.iscoroutinefunction(ASYNC[name]) is (name not in STREAMS)


def test_help_shows_what_each_client_returns():
    shown, shown_async = (pydoc.plain(pydoc.render_doc(client)) for client in (SteerClient, AsyncSteerClient))
    assert "|  tokenize(self, prompt: 'Prompt', *, timeout: 'Timeout' = " in shown
    assert "|  async tokenize(self, prompt: 'Prompt', *, timeout: 'Timeout' = " in shown_async
    assert "-> 'GenerationStream'\n |      As `generate`, piece by piece" in shown
    assert "-> 'AsyncGenerationStream'\n |      As `generate`, piece by piece" in shown_async


class Twice:
    """A method of two requests, the second of which depends on the first."""

    @method
    async def tokenize_twice(self, prompt: str) -> list[tuple[str, ...]]:
        """The tokens of a prompt, and those of its second token."""
        first = await self._answer(calls.tokenize(prompt), CLIENT_TIMEOUT)
        second = await self._answer(calls.tokenize(first.tokens[1]), CLIENT_TIMEOUT)
        return [first.tokens, second.tokens]

    @method
    async def wait(self) -> None:
        """Suspends."""
        await asyncio.sleep(0)


class BlockingTwice(Twice, SteerClient):
    pass


class AsyncTwice(Twice, AsyncSteerClient):
    pass


async def test_a_method_of_several_requests_is_written_once_too(fake):
    with BlockingTwice(fake.target) as client:
        assert client.tokenize_twice("a b") == [("a", " b"), ("a", " b")]
    async with AsyncTwice(fake.target) as async_client:
        assert await async_client.tokenize_twice("a b") == [("a", " b"), ("a", " b")]
    assert [request.prompt.text for request in fake.requests] == ["a b", " b"] * 2


def test_what_fails_between_two_requests_fails_the_method(fake):
    with BlockingTwice(fake.target) as client, pytest.raises(InvalidRequestError):
        client.tokenize_twice([2**40])
    assert fake.requests == []


def test_a_method_that_suspends_is_refused_on_the_blocking_client(fake):
    with BlockingTwice(fake.target) as client, pytest.raises(RuntimeError, match="awaited something that suspends"):
        client.wait()


async def test_the_blocking_client_works_inside_a_running_event_loop(client):
    assert client.generate("hello").text == "one two"


def test_a_type_checker_sees_both_clients_as_they_are():
    path = os.pathsep.join(str(ROOT / part) for part in ("clients/python", "protos"))
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", ROOT / "tests/client/typed_clients.py"],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": path},
        capture_output=True,
        text=True,
    )
    assert checked.stdout == "Success: no issues found in 1 source file\n", checked.stdout + checked.stderr
