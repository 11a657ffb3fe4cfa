"""One target that stands for several servers: asked in turn, those that do not serve left out."""

import json
import re
import time
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from steer_client import AsyncSteerClient, InvalidRequestError, ServerUnavailableError, SteerClient
from steer_client._channel import channel_options
from steer_client._cli.app import app
from typer.testing import CliRunner

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LONGEST = (16 << 20) - 1000
"""Of a prompt: what a server takes in one message, less the rest of it."""
STOPS = (grpc.StatusCode.UNAVAILABLE, "the server is shutting down", "SHUTTING_DOWN")


@pytest.fixture
def target(pair):
    return "ipv4:" + ",".join(fake.target for fake in pair)


def _asked(pair):
    return tuple(len(fake.requests) for fake in pair)


def _until_both_are_asked(pair, client):
    """The first requests go to whichever connection is there first."""
    end = time.monotonic() + 5
    while not all(_asked(pair)):
        client.tokenize("x")
        assert time.monotonic() < end, f"asked: {_asked(pair)}"
    for fake in pair:
        fake.requests.clear()


def _settle(pair, client, holds):
    """Returns when ten requests in a row left it so; fails when that takes too long."""
    end = time.monotonic() + 5
    while True:
        for fake in pair:
            fake.requests.clear()
        for _ in range(10):
            with suppress(ServerUnavailableError):
                client.tokenize("x")
        if holds():
            return
        assert time.monotonic() < end, f"asked: {_asked(pair)}"


@pytest.fixture(params=["unary", "stream"])
def way(request):
    def unary(client, prompt="hello"):
        return client.generate(prompt).text

    def stream(client, prompt="hello"):
        return "".join(delta.text for delta in client.stream(prompt))

    return {"unary": unary, "stream": stream}[request.param]


def test_requests_go_to_the_servers_in_turn(pair, target):
    with SteerClient(target, timeout=20) as client:
        _until_both_are_asked(pair, client)
        for _ in range(10):
            client.generate("hello")
    assert _asked(pair) == (5, 5)


async def test_requests_of_the_async_client_go_to_both(pair, target):
    async with AsyncSteerClient(target, timeout=20) as client:
        end = time.monotonic() + 5
        while not all(_asked(pair)) and time.monotonic() < end:
            await client.generate("hello")
    assert all(_asked(pair))


def test_a_server_that_says_that_it_does_not_serve_is_left_out_until_it_does(pair, target):
    one = pair[0]
    with SteerClient(target, timeout=20) as client:
        _until_both_are_asked(pair, client)
        one.health.set("", NOT_SERVING)
        _settle(pair, client, lambda: not one.requests)
        assert client.health()
        one.health.set("", health_pb2.HealthCheckResponse.SERVING)
        _until_both_are_asked(pair, client)
        for fake in pair:
            fake.health.set("", NOT_SERVING)
        _settle(pair, client, lambda: not any(_asked(pair)))
        with pytest.raises(ServerUnavailableError, match="is steer-server running there"):
            client.health()


def test_a_request_that_a_server_refuses_because_it_stops_is_answered_by_the_other(pair, target, make, way):
    with SteerClient(target, timeout=20) as client:
        _until_both_are_asked(pair, client)
        pair[0].fault, pair[0].events = make.fault(*STOPS), []
        assert [way(client) for _ in range(4)] == ["one two"] * 4
    assert all(_asked(pair))


@pytest.mark.parametrize("size", [1_000_000, LONGEST], ids=["a megabyte", "the longest"])
def test_a_long_request_that_a_server_refuses_is_answered_by_the_other(pair, target, make, way, size):
    prompt = "x" * size
    with SteerClient(target, timeout=20) as client:
        _until_both_are_asked(pair, client)
        pair[0].fault, pair[0].events = make.fault(*STOPS), []
        assert [way(client, prompt) for _ in range(2)] == ["one two"] * 2
    assert all(_asked(pair))


def test_an_answer_that_has_begun_is_not_asked_for_again(pair, target, make):
    for fake in pair:
        fake.events = make.events(make.response())[:2]
        fake.fault = make.fault(*STOPS)
    with SteerClient(target, timeout=20) as client:
        stream = client.stream("hello")
        items = iter(stream)
        assert next(items).text == "one"
        with pytest.raises(ServerUnavailableError):
            next(items)
    assert sum(_asked(pair)) == 1


def test_a_request_that_nobody_answers_is_tried_twice_and_no_more(pair, target, make):
    for fake in pair:
        fake.fault = make.fault(*STOPS)
    with SteerClient(target, timeout=20) as client, pytest.raises(ServerUnavailableError):
        client.generate("hello")
    assert sum(_asked(pair)) == 2


def test_one_server_is_asked_once(fake, make):
    fake.fault = make.fault(*STOPS)
    with SteerClient(fake.target, timeout=20) as client, pytest.raises(ServerUnavailableError):
        client.generate("hello")
    assert len(fake.requests) == 1


async def test_a_store_is_not_reloaded_on_one_server_of_several(pair, target):
    with SteerClient(target) as client, pytest.raises(InvalidRequestError, match="ask each by its HOST:PORT"):
        client.reload_operators()
    async with AsyncSteerClient(target) as client:
        with pytest.raises(InvalidRequestError, match="ask each by its HOST:PORT"):
            await client.reload_operators()
    assert _asked(pair) == (0, 0)


def test_the_command_takes_several_servers_and_reloads_none_of_them(target):
    assert CliRunner().invoke(app, ["generate", "hello", "--target", target]).stdout == "one two\n"
    refused = CliRunner().invoke(app, ["operators", "--reload", "--target", target])
    assert refused.exit_code == 1
    assert "ask each by its HOST:PORT" in refused.stderr


def test_the_service_config_that_the_page_gives_to_other_clients_is_that_of_this_one():
    page = (Path(__file__).parents[2] / "docs/LARGE.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"^```json\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert json.loads(shown) == json.loads(dict(channel_options("dns:///steer:1"))["grpc.service_config"])
    assert "grpc.service_config" not in dict(channel_options("steer:1"))
