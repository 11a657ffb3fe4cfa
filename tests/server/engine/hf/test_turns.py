"""Turns: by host, by connection, by job."""

from collections import Counter

import pytest

from steer_server.engine.hf.turns import FairTurns


def _run(turns, count, seconds=lambda job: 1.0):
    taken = []
    for _ in range(count):
        job = turns.next()
        turns.charge(job, seconds(job))
        taken.append(job)
    return taken


@pytest.fixture
def turns():
    """Jobs are their own paths: host, connection, number."""
    return FairTurns(lambda job: job)


def test_jobs_of_one_client_take_turns(turns):
    for job in (("h", "a", 1), ("h", "a", 2), ("h", "a", 3)):
        turns.add(job)
    assert Counter(_run(turns, 9)) == dict.fromkeys([("h", "a", 1), ("h", "a", 2), ("h", "a", 3)], 3)


def test_many_jobs_and_many_connections_get_what_one_gets(turns):
    for place in range(5):
        turns.add(("h", "many", place))
    turns.add(("h", "one", 0))
    for place in range(7):
        turns.add(("other", f"c{place}", 0))
    taken = _run(turns, 400)
    assert Counter(host for host, _, _ in taken) == {"h": 200, "other": 200}
    assert Counter(taken)["h", "one", 0] == 100


def test_time_counts_and_not_the_number_of_turns(turns):
    large, small = ("h", "a", 0), ("h", "b", 0)
    turns.add(large)
    turns.add(small)
    taken = Counter(_run(turns, 110, seconds=lambda job: 10.0 if job == large else 1.0))
    assert taken == {large: 10, small: 100}


def test_who_joins_is_next_and_catches_nothing_up(turns):
    old, new = ("h", "a", 0), ("h", "b", 0)
    turns.add(old)
    _run(turns, 100)
    turns.add(new)
    taken = _run(turns, 100)
    assert taken[0] == new
    assert 48 <= taken.count(old) <= 50
    turns.remove(new)
    assert _run(turns, 3) == [old] * 3
    turns.add(new)
    assert new in _run(turns, 2)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_short_job_is_done_before_the_next_turn_of_a_long_one(turns, depth):
    long = ("h", "a", 0)
    turns.add(long)
    for number in range(50):
        _run(turns, 20, seconds=lambda job: 0.01)
        short = tuple("new" if place == depth else part for place, part in enumerate(("h", "b", number)))
        turns.add(short)
        assert _run(turns, 5, seconds=lambda job: 0.01) == [short] * 5
        turns.remove(short)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_a_long_job_keeps_half_of_its_share_and_more_beside_clients_that_come_and_go(turns, at_once):
    long = ("h", "a", 0)
    turns.add(long)
    _run(turns, 10)
    used, present = Counter(), []
    for number in range(2000):
        while len(present) < at_once:
            job = ("h", f"new {number} {len(present)}", 0)
            turns.add(job)
            present.append([job, 3])
        job = turns.next()
        # Now and then a long part of a prompt.
        seconds = 0.3 if job == long and number % 7 == 0 else 0.1
        turns.charge(job, seconds)
        used[job == long] += seconds
        for each in [each for each in present if each[0] == job]:
            each[1] -= 1
            if not each[1]:
                turns.remove(job)
                present.remove(each)
    fair = 1 / (1 + at_once)
    assert used[True] / used.total() > 0.5 * fair
