"""Places to wait, shared between clients, and the line of those who were refused."""

import random
from contextlib import suppress

import pytest

from steer_server.access.grant import Grant
from steer_server.caller import Caller
from steer_server.engine.waiting_room import WaitingRoom
from steer_server.errors import QueueFullError


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def _enter(room, client, host="h", **options):
    room.enter(Caller(host, client, **options))


def _is_refused(room, client, **options):
    with pytest.raises(QueueFullError) as caught:
        _enter(room, client, **options)
    return caught.value


def test_a_newcomer_is_admitted_although_another_client_has_filled_the_room():
    room = WaitingRoom(8)
    for _ in range(8):
        _enter(room, "many")
    _is_refused(room, "many")
    _enter(room, "new")
    _enter(room, "newer")
    # Now also the places beyond the limit are taken.
    _is_refused(room, "newest")


def test_where_places_are_contended_a_client_has_no_more_than_its_share(clock):
    room = WaitingRoom(8, clock=clock)
    for _ in range(8):
        _enter(room, "many")
    for name in "abc":
        _enter(room, name) if name != "c" else _is_refused(room, "c")
    for _ in range(5):
        room.leave(Caller("h", "many"))
    # Clients: many, a, b and c in the line: two places each.
    _is_refused(room, "many")
    _enter(room, "c")
    # Nobody is in the line any more.
    _enter(room, "many")


def test_who_comes_back_when_told_finds_a_place_that_others_could_not_take(clock):
    room = WaitingRoom(4, clock=clock)
    for client in "abcde":
        _enter(room, client)
    told = _is_refused(room, "patient")
    clock.now += told.retry_after
    room.leave(Caller("h", "a"))
    for _ in range(5):
        _is_refused(room, "impatient")
    _enter(room, "patient")


def test_a_place_that_nobody_comes_back_for_is_given_to_others(clock):
    room = WaitingRoom(4, clock=clock)
    for client in "abcde":
        _enter(room, client)
    told = _is_refused(room, "gone")
    room.leave(Caller("h", "a"))
    _is_refused(room, "other")
    clock.now += 2.5 * told.retry_after + 5
    _enter(room, "other")


def test_hints_grow_with_those_before_and_are_not_the_same_for_all(clock):
    room = WaitingRoom(4, clock=clock)
    room.record(1.0)
    for client in "abcde":
        _enter(room, client)
    hints = [_is_refused(room, f"client {place}").retry_after for place in range(40)]
    for place, hint in enumerate(hints):
        assert 0.6 * (place + 1) <= hint <= place + 1
    assert len({hint / (place + 1) for place, hint in enumerate(hints)}) > 30
    assert max(_is_refused(room, f"many {place}").retry_after for place in range(300)) <= 60


def test_a_deadline_that_ends_before_the_turn_comes_is_refused_and_the_others_are_not(clock):
    room = WaitingRoom(100, clock=clock)
    for _ in range(20):
        _enter(room, "a")
    # Nothing has been measured yet.
    _enter(room, "a", deadline=clock.now + 1)
    room.record(2.0)
    error = _is_refused(room, "a", deadline=clock.now + 30)
    assert "wait for about 42.0 s, and its deadline is in 30.0 s" in str(error)
    _enter(room, "a", deadline=clock.now + 60)
    _enter(room, "new", deadline=clock.now + 1)


@pytest.mark.parametrize("seed", range(2))
def test_one_that_honours_hints_is_served_its_share_beside_forty_that_do_not(clock, seed):
    chosen = random.Random(seed)
    room = WaitingRoom(8, clock=clock)
    waiting, served, back = [], dict.fromkeys(range(41), 0), 0.0
    for _ in range(2000):
        clock.now += 0.1
        # One is served in every tenth of a second, and the forty ask again five times a second.
        if waiting:
            client = waiting.pop(0)
            room.leave(Caller("h", str(client)))
            room.record(0.1)
            served[client] += 1
        asking = [client for client in range(1, 41) if chosen.random() < 0.5]
        for client in chosen.sample([*asking, 0], len(asking) + 1):
            if client in waiting or (client == 0 and clock.now < back):
                continue
            try:
                _enter(room, str(client))
                waiting.append(client)
            except QueueFullError as error:
                back = clock.now + error.retry_after if client == 0 else back
    assert sum(served.values()) > 1990
    assert served[0] >= 2000 / 41
    assert min(served.values()) > 0.3 * 2000 / 41


def test_a_host_of_many_connections_does_not_keep_other_hosts_out(clock):
    room = WaitingRoom(8, clock=clock)
    room.record(1.0)
    for connection in range(400):
        with suppress(QueueFullError):
            room.enter(Caller("flood", str(connection)))
    # All places that connections get are taken, and the line is full.
    _is_refused(room, "new", host="flood")
    _enter(room, "a", host="one", deadline=clock.now + 2)
    _enter(room, "a", host="other")
    told = _is_refused(room, "a", host="third")
    assert told.retry_after <= 1, "its host is the first of those that wait"
    clock.now += told.retry_after
    room.leave(Caller("flood", "0"))
    for connection in range(400, 800):
        _is_refused(room, str(connection), host="flood")
    _enter(room, "a", host="third")


def test_of_places_that_are_free_a_host_gets_its_share_however_many_connections_another_has(clock):
    room = WaitingRoom(8, clock=clock)
    for connection in range(40):
        with suppress(QueueFullError):
            room.enter(Caller("flood", str(connection)))
    _enter(room, "a", host="one")
    for connection in range(8):
        room.leave(Caller("flood", str(connection)))
    # Two hosts: four places each.
    for _ in range(3):
        _enter(room, "a", host="one")
    _is_refused(room, "a", host="one")


def test_no_hint_is_none(clock):
    room = WaitingRoom(8, clock=clock)
    room.record(0.01)
    _enter(room, "a")
    assert _is_refused(room, "a", deadline=clock.now).retry_after >= 1


def test_a_token_has_no_more_than_its_share_of_the_places_however_many_are_free():
    room, grant = WaitingRoom(8), Grant("notebooks", queue_share=0.25)
    _enter(room, "a", "token:notebooks", grant=grant)
    _enter(room, "b", "token:notebooks", grant=grant)
    with pytest.raises(QueueFullError, match="2 requests of token 'notebooks' wait or are unread, and it may have 2"):
        _enter(room, "c", "token:notebooks", grant=grant)
    _enter(room, "c", "token:other")
    room.leave(Caller("token:notebooks", "a"))
    _enter(room, "c", "token:notebooks", grant=grant)


def test_the_smallest_share_is_one_place():
    room, grant = WaitingRoom(8), Grant("notebooks", queue_share=0.01)
    _enter(room, "a", "token:notebooks", grant=grant)
    with pytest.raises(QueueFullError, match="it may have 1"):
        _enter(room, "a", "token:notebooks", grant=grant)
