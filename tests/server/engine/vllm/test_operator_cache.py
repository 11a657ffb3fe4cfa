"""Operators in the workers: room reserved, loaded once, held while used, evicted where others need their room."""

import asyncio
from dataclasses import replace

import pytest
import torch

from operators.core.apply import prepare, prepared_bytes
from steer_server.engine.vllm.operator_cache import OperatorCache, required_operators
from steer_server.engine.vllm.operator_room import OperatorRoom
from steer_server.errors import InvalidRequestError, OperatorUnusableError
from steer_server.types import DecodeJob, Row, SamplingParams

SIZE = 4 * (4 * 4 + 4 + 4)
"""Of an operator of one position at d = 4, in float32."""


class Workers:
    """Hold what they are sent; loading waits for the gate of its digest, if it has one."""

    def __init__(self):
        self.loaded, self.log, self.most = {}, [], 0
        self.gates, self.broken = {}, {}

    async def load(self, artifact):
        digest = artifact.digest
        self.log.append(("load", digest))
        await asyncio.sleep(0)
        if digest in self.gates:
            await self.gates[digest].wait()
        if digest in self.broken:
            raise self.broken[digest]
        self.loaded[digest] = artifact
        self.most = max(self.most, len(self.loaded))

    async def unload(self, digests):
        self.log.append(("unload", *digests))
        await asyncio.sleep(0)
        if "unload" in self.gates:
            await self.gates["unload"].wait()
        if "unload" in self.broken:
            raise self.broken["unload"]
        for digest in digests:
            del self.loaded[digest]

    def loads(self, artifact):
        return self.log.count(("load", artifact.digest))


@pytest.fixture
def workers():
    return Workers()


@pytest.fixture
def cache_of(workers):
    """A cache with room for so many operators."""
    return lambda room: OperatorCache(workers.load, workers.unload, OperatorRoom(room * SIZE))


@pytest.fixture(scope="module")
def made(make_operator):
    return [make_operator(1, 4, seed=seed) for seed in range(4)]


async def hold(cache, artifacts):
    """As a request does it."""
    assert cache.room.fits(artifacts)
    cache.room.add(artifacts)
    try:
        await cache.load(artifacts)
    except BaseException:
        cache.room.remove(artifacts)
        raise


async def use(cache, *artifacts):
    """A request that is over at once."""
    await hold(cache, artifacts)
    cache.room.remove(artifacts)


async def _until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_an_operator_reaches_the_workers(cache_of, workers, made):
    cache = cache_of(4)
    await hold(cache, made[:2])
    assert workers.loaded == {artifact.digest: artifact for artifact in made[:2]}
    assert cache.num_bytes == 2 * SIZE


async def test_holding_nothing_loads_nothing(cache_of, workers):
    await hold(cache_of(4), [])
    assert workers.log == []


@pytest.mark.parametrize(("dtype", "affine"), [("float32", True), ("bfloat16", False), ("float64", True)])
def test_an_operator_takes_what_its_float32_numbers_take(make_operator, dtype, affine):
    artifact = make_operator(3, 5, affine=affine)
    if dtype != "float32":
        artifact = _as(artifact, getattr(torch, dtype))
    assert prepared_bytes(artifact) == prepare(artifact, torch.device("cpu")).nbytes


def _as(artifact, dtype):
    parts = {name: getattr(artifact, name) for name in ("factors", "anchor", "substitute_base", "offset")}
    return replace(artifact, **{name: part if part is None else part.to(dtype) for name, part in parts.items()})


# Loading.


async def test_concurrent_holders_of_an_operator_wait_for_one_load(cache_of, workers, made):
    cache = cache_of(4)
    gate = workers.gates[made[0].digest] = asyncio.Event()
    holders = [asyncio.ensure_future(hold(cache, [made[0], other])) for other in made[1:]]
    await _until(lambda: workers.loads(made[0]))
    await asyncio.sleep(0.01)
    assert not any(holder.done() for holder in holders)
    gate.set()
    await asyncio.gather(*holders)
    await hold(cache, [made[0]])
    assert [workers.loads(artifact) for artifact in made] == [1, 1, 1, 1]


async def test_an_operator_that_a_request_names_twice_is_held_once(cache_of, workers, made):
    cache = cache_of(1)
    await use(cache, made[0], made[0])
    await use(cache, made[1])
    assert workers.loaded.keys() == {made[1].digest}


async def test_a_load_that_fails_fails_all_who_wait_and_holds_nothing(cache_of, workers, made):
    cache = cache_of(2)
    gate = workers.gates[made[1].digest] = asyncio.Event()
    workers.broken[made[1].digest] = RuntimeError("out of memory")
    holders = [asyncio.ensure_future(hold(cache, made[:2])) for _ in range(3)]
    await _until(lambda: workers.loads(made[1]))
    gate.set()
    found = await asyncio.gather(*holders, return_exceptions=True)
    assert [str(error) for error in found] == ["out of memory"] * 3
    assert workers.loads(made[1]) == 1
    assert cache.num_bytes == SIZE
    del workers.broken[made[1].digest]
    # The one that was loaded before the failure is held by nobody.
    await hold(cache, made[1:3])
    assert workers.loads(made[1]) == 2
    assert workers.loaded.keys() == {made[1].digest, made[2].digest}


async def test_a_holder_that_gives_up_leaves_the_load_to_the_others_and_holds_nothing(cache_of, workers, made):
    cache = cache_of(1)
    gate = workers.gates[made[0].digest] = asyncio.Event()
    given_up, other = (asyncio.ensure_future(hold(cache, [made[0]])) for _ in range(2))
    await _until(lambda: workers.loads(made[0]))
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    gate.set()
    await other
    assert workers.loads(made[0]) == 1
    cache.room.remove([made[0]])
    await hold(cache, [made[1]])
    assert workers.loaded.keys() == {made[1].digest}


# Room.


async def test_what_is_released_stays_until_its_room_is_needed(cache_of, workers, made):
    cache = cache_of(2)
    await use(cache, *made[:2])
    await hold(cache, made[:1])
    assert workers.loaded.keys() == {made[0].digest, made[1].digest}
    assert [workers.loads(artifact) for artifact in made[:2]] == [1, 1]


async def test_the_least_recently_used_operator_goes_first(cache_of, workers, made):
    cache = cache_of(2)
    for place in (0, 1, 0, 2):
        await use(cache, made[place])
    assert workers.loaded.keys() == {made[0].digest, made[2].digest}
    assert ("unload", made[1].digest) in workers.log
    assert cache.num_bytes == 2 * SIZE
    await hold(cache, [made[1]])
    assert workers.loads(made[1]) == 2
    assert workers.loaded.keys() == {made[1].digest, made[2].digest}


async def test_an_operator_is_held_until_its_last_holder_releases_it(cache_of, workers, made):
    cache = cache_of(2)
    for _ in range(2):
        await hold(cache, [made[0]])
    cache.room.remove([made[0]])
    for other in made[1:]:
        await use(cache, other)
    assert made[0].digest in workers.loaded
    cache.room.remove([made[0]])
    await use(cache, *made[1:3])
    assert made[0].digest not in workers.loaded


async def test_what_is_not_held_is_not_released_nor_what_is_asked_for_with_it(cache_of, workers, made):
    cache = cache_of(2)
    await hold(cache, [made[0]])
    with pytest.raises(ValueError, match=made[1].digest):
        cache.room.remove(made[:2])
    await use(cache, made[1])
    await use(cache, made[2])
    assert workers.loaded.keys() == {made[0].digest, made[2].digest}


async def test_room_is_made_before_an_operator_is_loaded(cache_of, workers, made):
    cache = cache_of(2)
    for first in made:
        for second in made:
            await use(cache, first, second)
    assert workers.most == 2


async def test_what_others_hold_leaves_no_room_until_they_release_it(cache_of, workers, made):
    cache = cache_of(3)
    await hold(cache, made[:2])
    assert not cache.room.fits(made[2:])
    # What they hold is there for everybody.
    await use(cache, *made[:3])
    cache.room.remove(made[:1])
    await hold(cache, made[2:])
    assert workers.loaded.keys() == {artifact.digest for artifact in made[1:]}


async def test_a_request_that_does_not_fit_leaves_everything_as_it_was(cache_of, workers, made):
    cache = cache_of(2)
    await hold(cache, made[:1])
    for _ in range(3):
        assert not cache.room.fits(made[1:3])
    await use(cache, made[3])
    cache.room.remove(made[:1])
    await use(cache, *made[1:3])
    assert workers.loaded.keys() == {made[1].digest, made[2].digest}


async def test_room_is_taken_before_anything_is_loaded(cache_of, made):
    cache = cache_of(2)
    cache.room.add(made[:2])
    assert not cache.room.fits(made[2:3])
    assert cache.room.empty().fits(made[2:])
    cache.room.remove(made[:2])
    assert cache.room.fits(made[2:])


async def test_what_is_on_its_way_for_nobody_is_waited_for_and_then_makes_room(cache_of, workers, made):
    cache = cache_of(2)
    gate = workers.gates[made[0].digest] = asyncio.Event()
    given_up = asyncio.ensure_future(hold(cache, made[:1]))
    await _until(lambda: workers.loads(made[0]))
    given_up.cancel()
    next_one = asyncio.ensure_future(hold(cache, made[1:3]))
    await asyncio.sleep(0.01)
    assert not next_one.done()
    gate.set()
    await asyncio.wait_for(next_one, 5)
    assert workers.loaded.keys() == {made[1].digest, made[2].digest}
    assert workers.most == 2


async def test_one_who_waits_for_room_and_gives_up_has_nothing_loaded(cache_of, workers, made):
    cache = cache_of(1)
    gate = workers.gates[made[0].digest] = asyncio.Event()
    first = asyncio.ensure_future(hold(cache, [made[0]]))
    await _until(lambda: workers.loads(made[0]))
    first.cancel()
    await asyncio.sleep(0.01)
    waiting = asyncio.ensure_future(hold(cache, [made[1]]))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.sleep(0.01)
    third = asyncio.ensure_future(hold(cache, [made[2]]))
    await asyncio.sleep(0.01)
    gate.set()
    await asyncio.wait_for(third, 5)
    await asyncio.sleep(0.01)
    assert workers.loads(made[1]) == 0
    assert (workers.loaded.keys(), workers.most) == ({made[2].digest}, 1)


async def test_an_operator_that_is_wanted_while_it_goes_is_loaded_again(cache_of, workers, made):
    cache = cache_of(2)
    await use(cache, *made[:2])
    gate = workers.gates["unload"] = asyncio.Event()
    evicting = asyncio.ensure_future(use(cache, made[2]))
    await _until(lambda: ("unload", made[0].digest) in workers.log)
    again = asyncio.ensure_future(use(cache, made[0]))
    await _until(lambda: ("unload", made[1].digest) in workers.log)
    gate.set()
    await asyncio.gather(evicting, again)
    assert workers.loaded.keys() == {made[0].digest, made[2].digest}
    assert workers.loads(made[0]) == 2
    # In this order the workers get them.
    mine = [what for what, *digests in workers.log if made[0].digest in digests]
    assert mine == ["load", "unload", "load"]


@pytest.mark.parametrize("end", ["cancelled", "failed"])
async def test_a_holder_that_ends_while_room_is_made_holds_nothing(cache_of, workers, made, end):
    cache = cache_of(1)
    await use(cache, made[0])
    gate = workers.gates["unload"] = asyncio.Event()
    holder = asyncio.ensure_future(hold(cache, [made[1]]))
    await _until(lambda: ("unload", made[0].digest) in workers.log)
    if end == "cancelled":
        holder.cancel()
    else:
        workers.broken["unload"] = RuntimeError("it broke")
        gate.set()
    with pytest.raises((asyncio.CancelledError, RuntimeError)):
        await holder
    gate.set()
    workers.broken.clear()
    workers.loaded.pop(made[0].digest, None)
    await asyncio.wait_for(hold(cache, [made[2]]), 5)
    assert workers.loaded.keys() == {made[2].digest}
    assert cache.num_bytes == SIZE


# What a request needs.


def _job(*plans):
    return DecodeJob.of((1, 2), SamplingParams(), tuple(Row(plan) for plan in plans))


def test_a_job_needs_each_operator_of_its_rows_once_and_none_without_strength(made, plan_of):
    job = _job(None, plan_of((made[0], 0.5), (made[1], 0.0)), plan_of((made[2], 0.25), (made[0], -0.5)))
    found = required_operators(job, budget=2 * SIZE)
    assert [artifact.digest for artifact in found] == [made[0].digest, made[2].digest]
    assert required_operators(_job(None), budget=0) == []


def test_an_operator_that_takes_more_than_there_is_cannot_be_used(made, plan_of, make_operator):
    large = make_operator(2, 4)
    job = _job(plan_of((made[0], 0.5)), plan_of((made[1], 0.5), (large, 0.5)))
    with pytest.raises(
        OperatorUnusableError, match="takes 160 bytes in a worker; this server keeps 100 bytes"
    ) as caught:
        required_operators(job, budget=100)
    assert caught.value.name == "operator-1"


def test_operators_that_take_more_than_there_is_together_are_refused_with_their_sizes(made, plan_of):
    job = _job(plan_of((made[0], 0.5), (made[1], 0.5)), plan_of((made[2], 0.5)))
    assert len(required_operators(job, budget=3 * SIZE)) == 3
    with pytest.raises(InvalidRequestError) as caught:
        required_operators(job, budget=3 * SIZE - 1)
    assert caught.value.field == "operators"
    assert "take 288 bytes in a worker; this server keeps 287 bytes" in str(caught.value)
    assert "operator-0 96 bytes, operator-1 96 bytes" in str(caught.value)
    assert "--operator-memory" in str(caught.value)


def test_of_many_operators_the_largest_are_named(make_operator, plan_of):
    many = [make_operator(1 + place, 4, seed=place) for place in range(6)]
    with pytest.raises(InvalidRequestError) as caught:
        required_operators(_job(plan_of(*((each, 0.1) for each in many))), budget=500)
    assert str(caught.value).endswith(
        ": operator-5 416 bytes, operator-4 352 bytes, operator-3 288 bytes, operator-2 224 bytes and 2 more"
    )


async def test_however_small_they_are_only_so_many_are_kept_and_those_in_use_stay(workers, made):
    cache = OperatorCache(workers.load, workers.unload, OperatorRoom(1 << 30), max_kept=2)
    await use(cache, made[0])
    await hold(cache, made[1:2])
    await use(cache, made[2])
    assert set(workers.loaded) == {made[1].digest, made[2].digest}
    await hold(cache, made[2:])
    # Three are held, which is one more than are kept.
    assert set(workers.loaded) == {each.digest for each in made[1:]}
    cache.room.remove(made[1:])
    await use(cache, made[0])
    assert workers.most == 3
    assert len(workers.loaded) == 2
    assert made[0].digest in workers.loaded
