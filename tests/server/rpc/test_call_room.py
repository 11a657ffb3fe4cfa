"""Who gets the room for calls: each host its part, and whoever holds most of it makes room, without a server."""

import asyncio
from contextlib import ExitStack

import pytest

from steer_server.caller import Caller
from steer_server.errors import QueueFullError
from steer_server.rpc import call_limit
from steer_server.rpc.call_limit import CallLimit


async def test_whoever_has_most_calls_without_requests_makes_room_and_nobody_else_does(monkeypatch):
    # Without places that are kept for others.
    monkeypatch.setattr(call_limit, "_KEPT", 100)
    limit, ended = CallLimit(6), []
    few, many, newcomer = (Caller(host, f"{host}:1") for host in ("few", "many", "newcomer"))

    async def call(caller):
        with limit.admitted(caller) as place:
            try:
                async with place.request(60.0):
                    await asyncio.Event().wait()
            except QueueFullError:
                ended.append(caller.host)

    calls = [asyncio.ensure_future(call(caller)) for caller in (few, few, *[many] * 4)]
    await asyncio.sleep(0)
    for _ in range(2):
        calls.append(asyncio.ensure_future(call(newcomer)))
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert ended == ["many", "many"]
    # Two each now: a third would only take what another has as much right to.
    for caller in (few, many, newcomer):
        with pytest.raises(QueueFullError), limit.admitted(caller):
            pass
    for each in calls:
        each.cancel()
    await asyncio.wait(calls)
    assert limit.calls == 0


async def test_calls_that_take_long_keep_no_other_host_out():
    limit = CallLimit(16)
    with ExitStack() as running:

        def holds(host):
            """How many calls of a host are admitted."""
            for held in range(17):
                try:
                    running.enter_context(limit.admitted(Caller(host, f"{host}:{held % 3}")))
                except QueueFullError:
                    return held
            raise AssertionError

        # Alone, three quarters; of those that are kept each host gets its part, and each newcomer at least one.
        assert [holds(host) for host in "abcd"] == [12, 2, 1, 1]
        with pytest.raises(QueueFullError, match="16 calls are under way already"), limit.admitted(Caller("e", "e:1")):
            pass
    assert limit.calls == 0


@pytest.mark.parametrize("slow_seconds", [60.0, 0.0])
async def test_who_holds_many_calls_takes_no_place_from_requests_that_arrive(monkeypatch, slow_seconds):
    monkeypatch.setattr(call_limit, "_SLOW_SECONDS", slow_seconds)
    limit, many, few = CallLimit(16), Caller("many", "many:1"), Caller("few", "few:1")

    async def arrive():
        with limit.admitted(few) as place:
            async with place.request(60.0):
                await asyncio.Event().wait()

    with ExitStack() as running:
        for _ in range(12):
            running.enter_context(limit.admitted(many))
        arriving = [asyncio.ensure_future(arrive()) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert limit.calls == 14
        with pytest.raises(QueueFullError, match="are for others"), limit.admitted(many):
            pass
        await asyncio.sleep(0.01)
        assert not any(each.done() for each in arriving)
        for each in arriving:
            each.cancel()
        await asyncio.gather(*arriving, return_exceptions=True)
