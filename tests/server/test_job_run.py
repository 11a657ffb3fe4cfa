"""Several jobs of one call: how many are in the engine at once, what waits, and what is freed."""

import asyncio
import time
from contextlib import aclosing

import pytest

from steer_server.errors import EngineFailedError, QueueFullError
from steer_server.job_run import JobRun, Submitted
from steer_server.types import DecodeJob, FinishReason, Row, RowFinished, TokenEvent


class _Stream:
    def __init__(self, engine, job):
        self.engine, self.job, self.is_cancelled = engine, job, False
        engine.inside += 1
        engine.most = max(engine.most, engine.inside)

    async def __aiter__(self):
        await asyncio.sleep(0)
        if self.engine.fails_at == self.job.prompt_ids[0]:
            raise EngineFailedError("it broke")
        await self.engine.gate.wait()
        for row in range(len(self.job.rows)):
            yield TokenEvent(row, self.job.prompt_ids[0], "x")
            yield RowFinished(row, FinishReason.EOS, "", "", ())

    def cancel(self):
        if not self.is_cancelled:
            self.is_cancelled = True
            self.engine.inside -= 1


class _Engine:
    """Has a place for ``share`` jobs of a call, and refuses the next ``refusals`` that come after the first."""

    def __init__(self, share=2):
        self.share, self.refusals, self.fails_at = share, 0, None
        self.inside = self.most = self.refused = 0
        self.submitted = []
        self.gate = asyncio.Event()
        self.gate.set()

    def jobs_at_once(self, job):
        return self.share

    def submit(self, job):
        if self.submitted and self.refusals:
            self.refusals -= 1
            self.refused += 1
            raise QueueFullError("others are before this one", 0.01)
        self.submitted.append(job)
        return _Stream(self, job)


def _jobs(count, **fields):
    return [DecodeJob((place,), (Row(), Row()), **fields) for place in range(count)]


async def _events(run):
    return [event async for event in run]


@pytest.mark.parametrize(("share", "count"), [(1, 4), (2, 5), (3, 2), (2, 1)])
async def test_every_job_is_decoded_and_no_more_are_in_the_engine_than_a_calls_share(share, count):
    engine = _Engine(share)
    run = JobRun(engine, _jobs(count))
    events = await _events(run)
    run.cancel()
    assert engine.most == min(share, count)
    assert engine.inside == 0
    for job in range(count):
        of_job = [event.event for event in events if event.job == job]
        assert isinstance(of_job[0], Submitted)
        assert [event.row for event in of_job[1:] if isinstance(event, RowFinished)] == [0, 1]
        assert {event.token_id for event in of_job[1:] if isinstance(event, TokenEvent)} == {job}


async def test_every_job_waits_since_the_call_did():
    # As the time limit counts: the first jobs of a call, and those that wait for a place, are part of the wait.
    engine = _Engine(share=1)
    engine.refusals = 3
    before = time.monotonic()
    run = JobRun(engine, _jobs(3))
    after = time.monotonic()
    entered = set()
    async for event in run:
        await asyncio.sleep(0.02)
        if isinstance(event.event, Submitted):
            entered.add(event.event.at)
    assert engine.refused == 3
    [began] = entered
    assert before <= began <= after


async def test_a_first_job_that_is_refused_refuses_the_call():
    engine = _Engine()
    engine.submitted, engine.refusals = [None], 1
    with pytest.raises(QueueFullError):
        JobRun(engine, _jobs(3))


async def test_a_later_job_waits_for_its_place():
    engine = _Engine()
    engine.refusals = 5
    events = await _events(JobRun(engine, _jobs(3)))
    assert engine.refused == 5
    assert sum(isinstance(event.event, RowFinished) for event in events) == 6


async def test_what_leaves_no_time_for_a_job_ends_its_texts_without_it_having_begun():
    engine = _Engine(share=1)
    run = JobRun(engine, _jobs(3, time_limit=0.1))
    engine.refusals = 10**6
    events = await _events(run)
    ends = [(event.job, event.event.reason) for event in events if isinstance(event.event, RowFinished)]
    late = [(job, FinishReason.TIME_LIMIT) for job in (1, 1, 2, 2)]
    assert ends == [(0, FinishReason.EOS)] * 2 + late
    assert [job.prompt_ids for job in engine.submitted] == [(0,)]


async def test_the_time_of_a_job_is_what_the_jobs_before_it_have_left():
    engine = _Engine(share=1)
    run = JobRun(engine, _jobs(2, time_limit=5.0))
    await asyncio.sleep(0.05)
    await _events(run)
    first, second = engine.submitted
    assert first.time_limit == 5.0
    assert 4.0 < second.time_limit < 4.96


async def test_the_error_of_one_job_ends_all_of_them():
    engine = _Engine()
    engine.gate.clear()
    engine.fails_at = 1
    with pytest.raises(EngineFailedError, match="it broke"):
        await _events(JobRun(engine, _jobs(6)))
    assert (len(engine.submitted), engine.inside) == (2, 0)


@pytest.mark.parametrize("read", [0, 1, 3])
async def test_who_leaves_frees_every_place_and_begins_nothing_more(read):
    engine = _Engine()
    run = JobRun(engine, _jobs(6))
    async with aclosing(aiter(run)) as events:
        for _ in range(read):
            await anext(events)
    run.cancel()
    assert engine.inside == 0
    begun = len(engine.submitted)
    await asyncio.sleep(0.05)
    assert len(engine.submitted) == begun < 6
    assert engine.inside == 0
