"""A reader that does not read costs bounded memory; one that reads slowly gets everything."""

import asyncio

import pytest

from steer_server.engine.outbox import Outbox
from steer_server.errors import SlowReaderError
from steer_server.types import TokenEvent, TokenLogprob, TopLogprob

WORDY = TokenLogprob(1, "x", -1.0, tuple(TopLogprob(n, "y", -2.0) for n in range(20)))
"""Some 4000 bytes in an event."""


@pytest.fixture
def calls():
    return []


@pytest.fixture
def outbox_of(calls):
    return lambda **options: Outbox(
        lambda: calls.append("give up"), lambda: calls.append("caught up"), max_bytes=100_000, **options
    )


def _fill(outbox, tokens, start=0):
    for number in range(start, start + tokens):
        outbox.put(TokenEvent(0, number, "", WORDY))


async def test_a_reader_that_stops_is_given_up_when_it_is_too_far_behind(outbox_of, calls):
    outbox = outbox_of(patience=0.1)
    _fill(outbox, 20)
    assert not outbox.is_behind
    _fill(outbox, 10)
    assert outbox.is_behind
    await asyncio.sleep(0.3)
    assert calls == ["give up"]
    _fill(outbox, 10)
    # Nothing of what waited is kept, and nothing more is taken.
    assert isinstance(await outbox.get(), SlowReaderError)
    assert outbox._messages.empty()


async def test_a_reader_that_stops_within_the_bound_loses_nothing(outbox_of, calls):
    outbox = outbox_of(patience=0.02)
    _fill(outbox, 10)
    await asyncio.sleep(0.1)
    assert [(await outbox.get()).token_id for _ in range(10)] == list(range(10))
    assert calls == []


async def test_a_slow_reader_gets_everything_however_far_behind_it_is(outbox_of, calls):
    outbox = outbox_of(patience=0.05)
    _fill(outbox, 300)
    found = []
    while len(found) < 300:
        found.append((await outbox.get()).token_id)
        await asyncio.sleep(0.001)
    assert found == list(range(300))
    assert calls == ["caught up"]


async def test_a_reader_that_catches_up_is_not_behind_any_more(outbox_of, calls):
    outbox = outbox_of(patience=60.0)
    _fill(outbox, 26)
    assert outbox.is_behind
    for _ in range(13):
        await outbox.get()
    assert outbox.is_behind, "it would be again with the next tokens"
    await outbox.get()
    assert not outbox.is_behind
    _fill(outbox, 20)
    assert outbox.is_behind
    assert calls == ["caught up"]
    outbox.close()
    assert not outbox.is_behind


async def test_a_burst_for_a_reader_that_waits_is_no_reason_to_give_it_up(outbox_of, calls):
    outbox = outbox_of(patience=0.05)
    reading = asyncio.ensure_future(outbox.get())
    await asyncio.sleep(0.2)
    _fill(outbox, 100)
    assert (await reading).token_id == 0
    assert calls == []
    outbox.close()
