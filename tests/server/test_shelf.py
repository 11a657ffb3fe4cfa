"""Operators in the workers: loaded once, held while used, evicted when there are too many."""

import asyncio

import pytest

from operators.artifact import to_bytes
from steer_server.engine.shelf import OperatorShelf

SIZE = 10


class Workers:
    """Hold what they are sent; loading waits for the gate of its digest, if it has one."""

    def __init__(self):
        self.there, self.log = {}, []
        self.gates, self.broken = {}, {}

    async def load(self, digest, data):
        self.log.append(("load", digest))
        await asyncio.sleep(0)
        if digest in self.gates:
            await self.gates[digest].wait()
        if digest in self.broken:
            raise self.broken[digest]
        self.there[digest] = data
        return SIZE

    async def unload(self, digests):
        self.log.append(("unload", *digests))
        await asyncio.sleep(0)
        if "unload" in self.gates:
            await self.gates["unload"].wait()
        if "unload" in self.broken:
            raise self.broken["unload"]
        for digest in digests:
            del self.there[digest]

    def loads(self, artifact):
        return self.log.count(("load", artifact.digest))


@pytest.fixture
def workers():
    return Workers()


@pytest.fixture
def shelf_of(workers):
    """A shelf with room for so many operators."""
    return lambda room: OperatorShelf(workers.load, workers.unload, budget=room * SIZE)


@pytest.fixture(scope="module")
def made(make_operator):
    return [make_operator(1, 4, seed=seed) for seed in range(4)]


async def _until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_an_operator_reaches_the_workers_as_its_file(shelf_of, workers, made):
    shelf = shelf_of(4)
    await shelf.hold(made[:2])
    assert workers.there == {artifact.digest: to_bytes(artifact) for artifact in made[:2]}
    assert shelf.num_bytes == 2 * SIZE


async def test_holding_nothing_loads_nothing(shelf_of, workers):
    await shelf_of(4).hold([])
    assert workers.log == []


async def test_concurrent_holders_of_an_operator_wait_for_one_load(shelf_of, workers, made):
    shelf = shelf_of(4)
    gate = workers.gates[made[0].digest] = asyncio.Event()
    holders = [asyncio.ensure_future(shelf.hold([made[0], other])) for other in made[1:]]
    await _until(lambda: workers.loads(made[0]))
    await asyncio.sleep(0.01)
    assert not any(holder.done() for holder in holders)
    gate.set()
    await asyncio.gather(*holders)
    await shelf.hold([made[0]])
    assert [workers.loads(artifact) for artifact in made] == [1, 1, 1, 1]


async def test_an_operator_that_a_request_names_twice_is_held_once(shelf_of, workers, made):
    shelf = shelf_of(0)
    await shelf.hold([made[0], made[0]])
    shelf.release([made[0].digest, made[0].digest])
    await shelf.hold([made[1]])
    assert workers.there.keys() == {made[1].digest}


async def test_what_is_released_stays_until_its_room_is_needed(shelf_of, workers, made):
    shelf = shelf_of(2)
    await shelf.hold(made[:2])
    shelf.release(artifact.digest for artifact in made[:2])
    await shelf.hold(made[:1])
    assert workers.there.keys() == {made[0].digest, made[1].digest}
    assert [workers.loads(artifact) for artifact in made[:2]] == [1, 1]


async def test_the_least_recently_used_operator_goes_first(shelf_of, workers, made):
    shelf = shelf_of(2)
    for place in (0, 1, 0, 2):
        await shelf.hold([made[place]])
        shelf.release([made[place].digest])
    assert workers.there.keys() == {made[0].digest, made[2].digest}
    assert workers.log[-1] == ("unload", made[1].digest)
    assert shelf.num_bytes == 2 * SIZE
    await shelf.hold([made[1]])
    assert workers.loads(made[1]) == 2
    assert workers.there.keys() == {made[1].digest, made[2].digest}


async def test_an_operator_that_is_held_never_goes_whatever_the_budget(shelf_of, workers, made):
    shelf = shelf_of(1)
    await shelf.hold(made[:3])
    assert len(workers.there) == 3
    shelf.release([made[1].digest])
    await shelf.hold([made[3]])
    # Only one of the four is not held.
    assert workers.there.keys() == {made[0].digest, made[2].digest, made[3].digest}


async def test_an_operator_is_held_until_its_last_holder_releases_it(shelf_of, workers, made):
    shelf = shelf_of(0)
    for _ in range(2):
        await shelf.hold([made[0]])
    shelf.release([made[0].digest])
    await shelf.hold([made[1]])
    assert made[0].digest in workers.there
    shelf.release([made[0].digest])
    await shelf.hold([made[2]])
    assert made[0].digest not in workers.there


async def test_releasing_what_is_not_held_holds_nothing_back(shelf_of, workers, made):
    shelf = shelf_of(0)
    shelf.release([made[0].digest])
    await shelf.hold([made[0]])
    await shelf.hold([made[1]])
    assert made[0].digest in workers.there


async def test_what_is_loaded_for_one_request_does_not_go_to_make_room_for_another(shelf_of, workers, made):
    shelf = shelf_of(1)
    gate = workers.gates[made[1].digest] = asyncio.Event()
    first = asyncio.ensure_future(shelf.hold(made[:2]))
    await _until(lambda: workers.loads(made[1]))
    await shelf.hold([made[2]])
    assert workers.there.keys() == {made[0].digest, made[2].digest}
    gate.set()
    await first
    assert workers.there.keys() == {artifact.digest for artifact in made[:3]}


async def test_an_operator_that_is_wanted_while_it_goes_is_loaded_again(shelf_of, workers, made):
    shelf = shelf_of(1)
    await shelf.hold([made[0]])
    shelf.release([made[0].digest])
    gate = workers.gates["unload"] = asyncio.Event()
    evicting = asyncio.ensure_future(shelf.hold([made[1]]))
    await _until(lambda: ("unload", made[0].digest) in workers.log)
    again = asyncio.ensure_future(shelf.hold([made[0]]))
    await _until(lambda: workers.loads(made[0]) == 2)
    gate.set()
    await asyncio.gather(evicting, again)
    # In this order the workers get them.
    assert workers.log[-2:] == [("unload", made[0].digest), ("load", made[0].digest)]


async def test_a_load_that_fails_fails_all_who_wait_and_holds_nothing(shelf_of, workers, made):
    shelf = shelf_of(0)
    gate = workers.gates[made[1].digest] = asyncio.Event()
    workers.broken[made[1].digest] = RuntimeError("out of memory")
    holders = [asyncio.ensure_future(shelf.hold(made[:2])) for _ in range(3)]
    await _until(lambda: workers.loads(made[1]))
    gate.set()
    found = await asyncio.gather(*holders, return_exceptions=True)
    assert [str(error) for error in found] == ["out of memory"] * 3
    assert workers.loads(made[1]) == 1
    assert shelf.num_bytes == SIZE
    del workers.broken[made[1].digest]
    await shelf.hold([made[1]])
    assert workers.loads(made[1]) == 2
    # The one that was loaded before the failure is held by nobody.
    assert workers.there.keys() == {made[1].digest}


async def test_a_holder_that_gives_up_leaves_the_load_to_the_others_and_holds_nothing(shelf_of, workers, made):
    shelf = shelf_of(0)
    gate = workers.gates[made[0].digest] = asyncio.Event()
    given_up, other = (asyncio.ensure_future(shelf.hold([made[0]])) for _ in range(2))
    await _until(lambda: workers.loads(made[0]))
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    gate.set()
    await other
    assert workers.loads(made[0]) == 1
    shelf.release([made[0].digest])
    await shelf.hold([made[1]])
    assert workers.there.keys() == {made[1].digest}


@pytest.mark.parametrize("end", ["cancelled", "failed"])
async def test_a_holder_that_ends_while_room_is_made_holds_nothing(shelf_of, workers, made, end):
    shelf = shelf_of(0)
    await shelf.hold([made[0]])
    shelf.release([made[0].digest])
    gate = workers.gates["unload"] = asyncio.Event()
    holder = asyncio.ensure_future(shelf.hold([made[1]]))
    await _until(lambda: ("unload", made[0].digest) in workers.log)
    if end == "cancelled":
        holder.cancel()
    else:
        workers.broken["unload"] = RuntimeError("it broke")
        gate.set()
    with pytest.raises((asyncio.CancelledError, RuntimeError)):
        await holder
    workers.gates.clear()
    workers.broken.clear()
    workers.there.pop(made[0].digest, None)
    await shelf.hold([made[2]])
    assert workers.there.keys() == {made[2].digest}
