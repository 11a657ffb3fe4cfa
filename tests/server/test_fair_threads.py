import asyncio
import threading

import pytest

from steer_server.caller import CALLER, Caller, host_of
from steer_server.errors import ShuttingDownError
from steer_server.fair_threads import FairThreads


@pytest.fixture
async def threads():
    made = FairThreads(1, "test")
    yield made
    made.close()


class Work:
    """Functions that note their names in the order in which they ran; the first one waits until it is let go."""

    def __init__(self, threads):
        self.threads, self.done, self.gate = threads, [], threading.Event()

    def ask(self, caller, name):
        async def run():
            CALLER.set(Caller(caller))
            return await self.threads.run(lambda: self._work(name))

        return asyncio.ensure_future(run())

    def _work(self, name):
        if name == "first":
            self.gate.wait(10)
        self.done.append(name)
        return name


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_callers_take_turns_however_many_they_ask_for(threads):
    work = Work(threads)
    tasks = [work.ask("a", "first"), *(work.ask("a", f"a{n}") for n in range(4))]
    await settle()
    tasks += [work.ask("b", "b0"), work.ask("b", "b1"), work.ask("c", "c0")]
    await settle()
    work.gate.set()
    await asyncio.gather(*tasks)
    assert work.done == ["first", "a0", "b0", "c0", "a1", "b1", "a2", "a3"]


async def test_who_gives_up_costs_the_others_of_the_same_caller_no_turn(threads):
    work = Work(threads)
    tasks = [work.ask("a", name) for name in ("first", "given up", "a1")] + [work.ask("b", "b0")]
    await settle()
    tasks.pop(1).cancel()
    await settle()
    work.gate.set()
    await asyncio.gather(*tasks)
    assert work.done == ["first", "a1", "b0"]


async def test_no_more_run_at_once_than_there_are_threads():
    threads, running, most = FairThreads(2, "test"), [], []

    def work():
        running.append(1)
        most.append(len(running))
        threading.Event().wait(0.01)
        running.pop()

    try:
        await asyncio.gather(*(threads.run(work) for _ in range(12)))
    finally:
        threads.close()
    assert max(most) == 2


async def test_who_gives_up_while_waiting_is_passed_over(threads):
    work = Work(threads)
    tasks = [work.ask("a", name) for name in ("first", "a1", "a2")]
    await settle()
    tasks[1].cancel()
    await settle()
    work.gate.set()
    assert await asyncio.gather(tasks[0], tasks[2]) == ["first", "a2"]
    assert await work.ask("a", "again") == "again"


async def test_who_gives_up_while_it_runs_keeps_its_thread_until_the_end(threads):
    work = Work(threads)
    first, second = work.ask("a", "first"), work.ask("a", "second")
    await settle()
    first.cancel()
    await asyncio.sleep(0.05)
    assert work.done == []
    work.gate.set()
    assert await second == "second"
    assert work.done == ["first", "second"]


async def test_an_error_reaches_its_caller_and_frees_the_thread(threads):
    def fail():
        raise KeyError("x")

    for _ in range(3):
        with pytest.raises(KeyError):
            await threads.run(fail)
    assert await threads.run(lambda: 5) == 5


async def test_closing_refuses_those_who_wait(threads):
    work = Work(threads)
    tasks = [work.ask("a", name) for name in ("first", "second", "third")]
    await settle()
    threads.close()
    work.gate.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert found[0] == "first"
    assert [type(each) for each in found[1:]] == [ShuttingDownError] * 2
    with pytest.raises(ShuttingDownError):
        await threads.run(lambda: None)


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.1:5123", "ipv4:10.0.0.1"),
        ("ipv6:[::1]:5123", "ipv6:::/64"),
        ("ipv6:%5B::1%5D:5123", "ipv6:::/64"),
        # One network has addresses without number.
        ("ipv6:%5B2001:db8:1:2:3::4%5D:5123", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:ffff::1]:1", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:3::1]:1", "ipv6:2001:db8:1:3::/64"),
        ("ipv6:[fe80::1%25eth0]:1", "ipv6:fe80::/64"),
        ("ipv6:[::ffff:10.0.0.1]:1", "ipv6:10.0.0.1"),
        ("ipv6:[::ffff:10.0.0.2]:1", "ipv6:10.0.0.2"),
        ("ipv6:nonsense:1", "ipv6:nonsense"),
        ("unix:", "unix:"),
        ("unix:/run/x:1", "unix:/run/x:1"),
        ("", ""),
    ],
)
def test_a_host_is_one_caller_whatever_its_ports(peer, host):
    assert host_of(peer) == host
