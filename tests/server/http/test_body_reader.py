"""A body is read beside the event loop: it holds up neither other requests nor, for long, other bodies."""

import asyncio
import json
import threading

import pytest

from steer_server.caller import CALLER, Caller
from steer_server.http import body_reader
from steer_server.http.bodies import BodyLimits
from steer_server.http.body_reader import BodyReader
from steer_server.rpc.parts import HTTP

PATH = "/api/Generate"
LARGE = {"prompt": {"text": "x"}, "request_id": "x" * (17 << 10)}
LIMITS = BodyLimits(4 << 20, 100, 100)


class Gate:
    """In place of what parses: a long body waits until it is let go."""

    def __init__(self, monkeypatch):
        self.opened, self.entered = threading.Event(), threading.Semaphore(0)
        self._read = body_reader.read_object
        monkeypatch.setattr(body_reader, "read_object", self)

    def __call__(self, data, limits):
        self.entered.release()
        if len(data) > 16 << 10:
            assert self.opened.wait(20)
        return self._read(data, limits)


@pytest.fixture
def gate(monkeypatch):
    made = Gate(monkeypatch)
    yield made
    made.opened.set()


async def test_requests_are_answered_while_a_long_body_is_read(start, gate):
    door = await start()
    room = door.server.doors[0]._rules.bodies.room
    whole = room.left
    long = [asyncio.ensure_future(door.post(PATH, LARGE)) for _ in range(3)]
    for _ in range(2):
        assert await asyncio.to_thread(gate.entered.acquire, timeout=10)
    assert (await door.post(PATH, {"prompt": {"text": "x"}})).status == 200
    assert (await door.get("/api/model")).status == 200
    assert door.server._metrics.in_flight[HTTP] == 3, "a stopping server waits for them"
    assert room.left == whole - 3 * len(json.dumps(LARGE)), "those that wait take their room"
    assert not any(each.done() for each in long)
    gate.opened.set()
    answers = await asyncio.gather(*long)
    assert [(each.status, each.error["param"]) for each in answers] == [(400, "request_id")] * 3
    assert room.left == whole


async def test_who_leaves_while_a_long_body_waits_gives_its_room_back(start, gate):
    door = await start()
    room = door.server.doors[0]._rules.bodies.room
    whole = room.left
    long = [asyncio.ensure_future(door.post(PATH, LARGE)) for _ in range(2)]
    for _ in long:
        assert await asyncio.to_thread(gate.entered.acquire, timeout=10)
    _, writer = await door.open()
    writer.write(door.request("POST", PATH, LARGE))
    taken = 3 * len(json.dumps(LARGE))
    for size in (taken, taken // 3 * 2):
        async with asyncio.timeout(5):
            while whole - room.left != size:
                await asyncio.sleep(0.01)
        writer.close()
    gate.opened.set()
    await asyncio.gather(*long)


@pytest.mark.parametrize("size", [20 << 10, 2 << 20])
async def test_one_senders_long_bodies_do_not_hold_anothers(gate, size):
    reader, order = BodyReader(LIMITS), []
    data = json.dumps({"a": "x" * size}).encode()

    def read(host, name):
        async def run():
            CALLER.set(Caller(host))
            await reader.read(data, lambda _: order.append(name))

        return asyncio.ensure_future(run())

    # As many as there are threads begin; then each host has its turn.
    work = [read("one", f"one {number}") for number in range(6)]
    await asyncio.sleep(0)
    work.append(read("two", "two"))
    await asyncio.sleep(0)
    gate.opened.set()
    await asyncio.gather(*work)
    assert order.index("two") <= 4
    reader.close()


async def test_a_short_body_is_read_at_once():
    reader = BodyReader(LIMITS)
    reader.close()
    assert await reader.read(b'{"a": 1}', lambda body: body) == {"a": 1}
