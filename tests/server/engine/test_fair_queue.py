"""Which job is next, how long one may be put off by others, and what counts until it is delivered."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from steer_server.caller import Caller
from steer_server.engine.fair_queue import PATIENCE, FairQueue
from steer_server.errors import QueueFullError


@dataclass(frozen=True, eq=False)
class Job:
    client: str = "a"
    size: int = 1
    host: str = "h"

    @property
    def caller(self) -> Caller:
        return Caller(self.host, self.client)


class Room:
    """For jobs of so much size together."""

    def __init__(self, size: int) -> None:
        self.size, self.taken = size, 0

    def fits(self, job: Job, mine: int) -> bool:
        return self.taken + job.size <= self.size

    def add(self, job: Job) -> None:
        self.taken += job.size

    def remove(self, job: Job) -> None:
        self.taken -= job.size

    def empty(self) -> Room:
        return Room(self.size)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def queue(clock):
    return FairQueue(32, Room(10), clock=clock)


def _put(queue, *jobs):
    for job in jobs:
        queue.put(job)
    return jobs[0]


def _begun(queue):
    begun = []
    while (job := queue.begin_next()) is not None:
        begun.append(job)
    return begun


def test_a_burst_of_one_client_leaves_the_next_place_to_another(queue):
    burst = [Job("burst") for _ in range(20)]
    _put(queue, *burst)
    assert _begun(queue) == burst[:10]
    other = _put(queue, Job("other"))
    queue.end(burst[0], 1.0)
    assert _begun(queue) == [other]
    queue.end(burst[1], 1.0)
    assert _begun(queue) == [burst[10]]


def test_where_one_job_runs_at_once_clients_and_their_hosts_take_turns(clock):
    queue = FairQueue(32, Room(1), clock=clock)
    burst = [Job("burst") for _ in range(4)]
    few = [Job("few") for _ in range(2)]
    other = [Job("a", host="other") for _ in range(3)]
    _put(queue, *burst, *few, *other)
    order = []
    while begun := _begun(queue):
        order += begun
        queue.end(begun[0], 1.0)
    assert order == [burst[0], other[0], few[0], other[1], burst[1], other[2], few[1], *burst[2:]]


def test_a_client_with_a_large_job_comes_after_one_with_a_small_one(queue):
    large, small = Job("large", 6), Job("small", 2)
    _put(queue, large, small, Job("filler", 2))
    _begun(queue)
    more = [Job("large", 2), Job("small", 2)]
    _put(queue, *more)
    queue.end(large, 1.0)
    # Nothing of "large" runs any more.
    assert _begun(queue) == more
    assert (queue.waiting, len(queue.running)) == ([], 4)


def test_a_large_job_is_passed_by_small_ones_and_then_only_within_what_it_leaves(queue, clock):
    first = [Job("f", 2) for _ in range(4)]
    _put(queue, *first)
    _begun(queue)
    large = _put(queue, Job("large", 7))
    soon = [_put(queue, Job(f"s{n}", 2)) for n in range(2)]
    assert _begun(queue) == soon[:1], "it fits, and the large one does not"
    clock.now += PATIENCE + 1
    queue.end(first[0], 1.0)
    late = [Job(f"l{n}", 2) for n in range(2)]
    _put(queue, *late)
    assert _begun(queue) == soon[1:], "what the large one leaves is 3"
    queue.end(first[1], 1.0)
    assert _begun(queue) == [], "4 would put it off"
    queue.end(soon[1], 1.0)
    assert _begun(queue) == late[:1]
    queue.end(first[2], 1.0)
    queue.end(first[3], 1.0)
    queue.end(soon[0], 1.0)
    assert _begun(queue) == [large]
    queue.end(late[0], 1.0)
    assert _begun(queue) == late[1:]


def test_however_many_small_jobs_come_a_large_one_begins_when_those_before_it_have_ended(queue, clock):
    first = [Job(f"f{n}", 2) for n in range(5)]
    _put(queue, *first)
    _begun(queue)
    large = _put(queue, Job("large", 9))
    clock.now += PATIENCE + 1
    for number, job in enumerate(first):
        _put(queue, Job(f"s{number}", 1), Job(f"t{number}", 2))
        queue.end(job, 1.0)
        if number < 4:
            assert large not in _begun(queue)
    assert large in [*_begun(queue), *queue.running]


def test_a_clients_own_jobs_do_not_pass_its_long_waiting_one_and_others_do(queue, clock):
    running = _put(queue, Job("a", 4))
    _begun(queue)
    large = _put(queue, Job("a", 9))
    clock.now += PATIENCE + 1
    own, others = Job("a", 1), Job("b", 6)
    _put(queue, own, others)
    assert _begun(queue) == [others], "it has something running, so it is not kept for alone"
    queue.end(others, 1.0)
    queue.end(running, 1.0)
    assert _begun(queue) == [large, own]


def test_what_is_decoded_and_not_read_keeps_a_place(clock):
    queue = FairQueue(2, Room(1), clock=clock)
    done = []
    for _ in range(2):
        done.append(_put(queue, Job()))
        assert _begun(queue) == done[-1:]
        queue.end(done[-1], 1.0)
    assert (queue.undelivered, queue.waiting, queue.running) == (2, [], [])
    with pytest.raises(QueueFullError, match="2 requests wait or are unread, 2 of them yours"):
        queue.put(Job())
    # Others have places of their own.
    queue.put(Job("b"))
    assert not queue.leave(done[0])
    assert queue.undelivered == 1
    queue.leave(done[0])
    queue.leave(done[1])
    assert queue.undelivered == 0
    queue.put(Job())


def test_who_left_before_the_end_keeps_no_place(queue):
    job = _put(queue, Job())
    _begun(queue)
    assert not queue.leave(job)
    queue.end(job, 1.0)
    assert queue.undelivered == 0


def test_a_job_that_leaves_while_it_waits_never_begins(queue):
    job = _put(queue, Job())
    assert queue.leave(job)
    assert not queue.leave(job)
    assert _begun(queue) == []
