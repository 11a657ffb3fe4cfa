"""The threads of the store's files."""

import asyncio
import threading

import pytest

from steer_server.admin import threads
from steer_server.caller import CALLER, Caller
from steer_server.errors import QueueFullError, ShuttingDownError


@pytest.fixture
async def files():
    made = threads.FileThreads()
    yield made
    made.close()


async def test_a_disk_that_hangs_holds_up_so_many_and_nobody_else(files, monkeypatch):
    monkeypatch.setattr(threads, "_MOST", 6)
    hangs = threading.Event()
    waiting = [asyncio.ensure_future(files.ask(hangs.wait)) for _ in range(6)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="6 changes of the store are under way"):
        await files.ask(hangs.wait)
    assert await asyncio.wait_for(asyncio.to_thread(lambda: "others go on"), 5)
    hangs.set()
    assert await asyncio.gather(*waiting) == [True] * 6
    assert await files.ask(lambda: 1) == 1


async def test_what_runs_there_knows_its_caller_and_is_waited_for(files):
    CALLER.set(Caller("h", "c"))
    assert (await files.ask(CALLER.get)).host == "h"
    begun, goes_on = threading.Event(), threading.Event()

    def work():
        begun.set()
        goes_on.wait()

    task = asyncio.ensure_future(files.to_its_end(work))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_after_the_end_nothing_begins(files):
    files.close()
    with pytest.raises(ShuttingDownError):
        await files.ask(lambda: 1)
