"""A call that a server refuses before it did anything is sent again, when the server says so and within the timeout."""

import asyncio
import threading
import time

import grpc
import pytest
from steer_client import (
    AsyncSteerClient,
    DeadlineExceededError,
    OperatorUse,
    RequestCancelledError,
    ServerBusyError,
    ServerUnavailableError,
    SteerClient,
)

C = grpc.StatusCode


def _sync(target, way, **options):
    with SteerClient(target, **options) as client:
        if way == "unary":
            return client.generate("x")
        if way == "compare":
            return client.compare("x", operators=[OperatorUse("golden-gate")])
        return _read(client.stream("x"))


def _read(stream):
    for _ in stream:
        pass
    return stream.result


def _async(target, way, **options):
    async def run():
        async with AsyncSteerClient(target, **options) as client:
            if way == "unary":
                return await client.generate("x")
            if way == "compare":
                return await client.compare("x", operators=[OperatorUse("golden-gate")])
            stream = client.stream("x")
            async for _ in stream:
                pass
            return stream.result

    return asyncio.run(run())


@pytest.fixture(params=[_sync, _async], ids=["sync", "async"])
def kind(request):
    return request.param


@pytest.fixture(params=["unary", "stream", "compare"])
def call(request, kind):
    return lambda target, **options: kind(target, request.param, **options)


@pytest.fixture
def busy(make):
    return lambda seconds: make.fault(C.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_after=seconds)


def test_a_busy_server_is_asked_again_when_it_says_so(fake, call, busy):
    fake.refusals = [busy(0.3), busy(0.2), busy(0.1)]
    began = time.monotonic()
    assert call(fake.target, timeout=20)
    assert len(fake.requests) == 4
    assert time.monotonic() - began >= 0.6


def test_without_retries_the_error_is_the_callers_at_once(fake, call, busy):
    fake.refusals = [busy(0.1)]
    with pytest.raises(ServerBusyError):
        call(fake.target, timeout=20, retry=False)
    assert len(fake.requests) == 1


def test_nobody_waits_for_longer_than_the_timeout(fake, call, busy):
    fake.refusals = [busy(0.1), busy(30.0)]
    began = time.monotonic()
    with pytest.raises(ServerBusyError) as caught:
        call(fake.target, timeout=10)
    assert caught.value.retry_after == 30.0
    assert len(fake.requests) == 2
    assert time.monotonic() - began < 9


def test_a_hint_that_is_not_given_is_not_guessed(fake, call, make):
    fake.refusals = [make.fault(C.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL")]
    with pytest.raises(ServerBusyError):
        call(fake.target, timeout=20)
    assert len(fake.requests) == 1


def test_a_server_that_stops_is_not_asked_again(fake, call, make):
    fake.refusals = [make.fault(C.UNAVAILABLE, "the server is shutting down", "SHUTTING_DOWN")]
    with pytest.raises(ServerUnavailableError) as caught:
        call(fake.target, timeout=20)
    assert not caught.value.is_unsent
    assert len(fake.requests) == 1


def test_a_connection_that_broke_amid_a_request_is_no_reason_to_send_it_again(fake, call, make):
    fake.refusals = [make.fault(C.UNAVAILABLE, "Socket closed")]
    with pytest.raises(ServerUnavailableError) as caught:
        call(fake.target, timeout=20)
    assert not caught.value.is_unsent
    assert len(fake.requests) == 1


def test_where_nobody_listens_it_is_said_soon(call, free_port_of_nobody):
    began = time.monotonic()
    with pytest.raises(ServerUnavailableError) as caught:
        call(free_port_of_nobody, timeout=20)
    assert caught.value.is_unsent
    assert time.monotonic() - began < 10


@pytest.fixture
def free_port_of_nobody():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"127.0.0.1:{port}"


def test_a_stream_that_has_begun_is_not_sent_again(fake, kind, busy):
    fake.fault = busy(0.1)
    with pytest.raises(ServerBusyError):
        kind(fake.target, "stream", timeout=20)
    assert len(fake.requests) == 1


def test_a_stream_that_is_cancelled_while_it_waits_is_not_sent_again(fake, busy):
    fake.refusals = [busy(1.0)]
    with SteerClient(fake.target, timeout=20) as client:
        stream = client.stream("x")
        threading.Timer(0.3, stream.cancel).start()
        with pytest.raises(Exception, match="cancelled"):
            _read(stream)
    assert len(fake.requests) == 1


@pytest.mark.parametrize("hint", [0.0, -1.0])
def test_a_hint_of_nothing_is_no_reason_to_ask_without_a_pause(fake, call, busy, hint):
    fake.refusals = [busy(hint)] * 1000
    with pytest.raises((ServerBusyError, DeadlineExceededError)):
        call(fake.target, timeout=1)
    assert len(fake.requests) <= 21


def test_a_hint_of_years_is_the_callers_to_judge(fake, call, busy):
    fake.refusals = [busy(1e11)]
    with pytest.raises(ServerBusyError) as caught:
        call(fake.target, timeout=None)
    assert caught.value.retry_after == 1e11


def test_a_stream_that_is_cancelled_while_it_is_sent_again_ends_on_the_server(fake, busy):
    fake.refusals = [busy(0.1)]
    fake.hang_after = 1
    with SteerClient(fake.target, timeout=20) as client:
        stream = client.stream("x")
        send = stream._send

        def send_and_lose(**options):
            # Another thread, just before the call is there to be cancelled.
            fake.left.clear()
            rpc = send(**options)
            _until(lambda: len(fake.requests) == 2)
            stream.cancel()
            return rpc

        stream._send = send_and_lose
        with pytest.raises(RequestCancelledError):
            _read(stream)
        assert fake.left.wait(5)


def _until(condition):
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
