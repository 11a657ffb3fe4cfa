"""A reader that does not read costs bounded memory; one that reads slowly gets everything."""

import asyncio

import pytest

from steer_server.errors import EngineFailedError, SlowReaderError
from steer_server.read_ahead import read_ahead
from steer_server.types import TokenEvent, TokenLogprob, TopLogprob

WORDY = TokenLogprob(1, "x", -1.0, tuple(TopLogprob(n, "y", -2.0) for n in range(20)))


class _Job:
    """So many tokens, one in each turn of the event loop, until it is cancelled."""

    def __init__(self, tokens: int, error: Exception | None = None) -> None:
        self.tokens, self.error, self.made, self.is_cancelled = tokens, error, 0, False

    async def __aiter__(self):
        while self.made < self.tokens and not self.is_cancelled:
            self.made += 1
            yield TokenEvent(0, self.made, "", WORDY)
            await asyncio.sleep(0)
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        self.is_cancelled = True


async def test_a_reader_that_stops_is_given_up_when_it_is_too_far_behind():
    job = _Job(10**6)
    events = read_ahead(job, job.cancel, max_bytes=100_000, patience=0.1)
    await anext(events)
    await asyncio.sleep(0.5)
    assert job.is_cancelled
    made = job.made
    assert 100_000 / 6000 < made < 10**6
    with pytest.raises(SlowReaderError):
        # Nothing of what waited is kept.
        await anext(events)
    assert job.made == made


async def test_a_reader_that_stops_within_the_bound_loses_nothing():
    job = _Job(10)
    events = read_ahead(job, job.cancel, max_bytes=100_000, patience=0.05)
    await anext(events)
    await asyncio.sleep(0.3)
    assert [event.token_id async for event in events] == list(range(2, 11))


async def test_a_slow_reader_gets_everything_however_far_behind_it_is():
    job = _Job(300)
    events = read_ahead(job, job.cancel, max_bytes=1000, patience=1.0)
    found = []
    async for event in events:
        found.append(event.token_id)
        await asyncio.sleep(0.001)
    assert found == list(range(1, 301))
    assert not job.is_cancelled


async def test_an_error_of_the_job_comes_after_its_events():
    job = _Job(3, EngineFailedError("broken"))
    events = read_ahead(job, job.cancel)
    assert [(await anext(events)).token_id for _ in range(3)] == [1, 2, 3]
    with pytest.raises(EngineFailedError, match="broken"):
        await anext(events)


async def test_a_reader_that_leaves_stops_the_reading():
    job = _Job(10**9)
    events = read_ahead(job, job.cancel)
    await anext(events)
    await events.aclose()
    await asyncio.sleep(0.02)
    made = job.made
    await asyncio.sleep(0.05)
    assert job.made == made
