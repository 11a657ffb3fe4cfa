"""Who may begin beside the rows that are inside vLLM."""

from dataclasses import dataclass, field

import pytest

from operators.core.apply import prepared_bytes
from steer_server.caller import Caller
from steer_server.engine.fair_queue import FairQueue
from steer_server.engine.vllm.job_memory import JobMemory
from steer_server.engine.vllm.operator_room import NO_MEMORY, OperatorRoom
from steer_server.engine.vllm.seats import Seats


@dataclass(frozen=True, eq=False)
class Job:
    client: str = "a"
    size: int = 1
    operators: list = field(default_factory=list)
    memory: JobMemory = NO_MEMORY

    @property
    def caller(self):
        return Caller("h", self.client)


@pytest.fixture(scope="module")
def made(make_operator):
    return [make_operator(1, 4, seed=seed) for seed in range(3)]


def _begun(queue, *jobs):
    for job in jobs:
        queue.put(job)
    begun = []
    while (job := queue.begin_next()) is not None:
        begun.append(job)
    return begun


def test_a_burst_of_one_client_leaves_seats_to_others_who_begin_at_once():
    queue = FairQueue(64, Seats(16, OperatorRoom(0)))
    burst = [Job("burst") for _ in range(40)]
    assert _begun(queue, *burst) == burst[:14]
    others = [Job(name) for name in "bcd"]
    assert _begun(queue, *others) == others[:2]
    queue.end(burst[0], 1.0)
    assert _begun(queue) == others[2:]
    queue.end(burst[1], 1.0)
    queue.end(others[0], 1.0)
    assert _begun(queue) == [], "two are kept for who comes next"
    queue.end(others[1], 1.0)
    assert _begun(queue) == burst[14:15]


def test_a_comparison_of_more_rows_than_there_are_seats_begins_alone():
    queue = FairQueue(8, Seats(4, OperatorRoom(0)))
    small, large, later = Job(), Job("b", 17), Job("c")
    assert _begun(queue, small, large, later) == [small, later]
    queue.end(small, 1.0)
    assert _begun(queue) == []
    queue.end(later, 1.0)
    assert _begun(queue) == [large]


def test_a_job_whose_operators_find_no_room_waits_and_others_pass_it(made):
    room = OperatorRoom(2 * prepared_bytes(made[0]))
    queue = FairQueue(8, Seats(4, room))
    first, third = Job("a", operators=made[:2]), Job("b", operators=made[2:])
    shared, plain = Job("c", operators=made[1:2]), Job("d")
    assert _begun(queue, first, third, shared, plain) == [first, shared, plain]
    queue.end(first, 1.0)
    assert _begun(queue) == [third]
    assert [artifact.digest in room for artifact in made] == [False, True, True]
