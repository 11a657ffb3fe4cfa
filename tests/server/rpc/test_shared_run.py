"""Runs are shared, one at a time, and go on without those who asked."""

import asyncio
import gc
import threading

import pytest

from steer_server.rpc.shared_run import SharedRun


class Counted:
    """A function that waits for ``go``, and counts."""

    def __init__(self):
        self.begun = self.ended = self.most = 0
        self.go = threading.Event()

    def __call__(self):
        self.begun += 1
        number = self.begun
        self.most = max(self.most, self.begun - self.ended)
        assert self.go.wait(10)
        self.ended += 1
        return number


async def _until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_those_who_ask_during_a_run_share_the_next_one():
    function = Counted()
    runs = SharedRun(function)
    first = asyncio.ensure_future(runs.run())
    await _until(lambda: function.begun == 1)
    later = [asyncio.ensure_future(runs.run()) for _ in range(8)]
    await asyncio.sleep(0)
    function.go.set()
    assert await first == 1
    assert set(await asyncio.gather(*later)) == {2}
    assert function.most == 1


async def test_a_run_whose_callers_have_left_ends_before_the_next_begins():
    function = Counted()
    runs = SharedRun(function)
    for _ in range(8):
        abandoned = asyncio.ensure_future(runs.run())
        await asyncio.sleep(0.01)
        abandoned.cancel()
    await _until(lambda: function.begun == 1)
    last = asyncio.ensure_future(runs.run())
    await asyncio.sleep(0.02)
    assert function.begun == 1
    function.go.set()
    assert await last == 2
    assert function.most == 1


async def test_an_error_reaches_those_who_asked_and_not_the_next():
    answers = iter([OSError("no disk"), "fine"])

    def function():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    runs = SharedRun(function)
    with pytest.raises(OSError, match="no disk"):
        await runs.run()
    assert await runs.run() == "fine"


async def test_a_failure_that_nobody_waits_for_is_no_complaint():
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context["message"]))
    begun, goes_on = threading.Event(), threading.Event()

    def fail():
        begun.set()
        goes_on.wait(10)
        raise OSError("the disk is gone")

    shared = SharedRun(fail)
    asked = asyncio.ensure_future(shared.run())
    await asyncio.to_thread(begun.wait, 10)
    asked.cancel()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await asked
    # Runs after the one that failed, and tells its own caller.
    with pytest.raises(OSError, match="the disk is gone"):
        await shared.run()
    del shared
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []
