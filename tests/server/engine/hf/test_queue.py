import asyncio
import threading
from types import SimpleNamespace

import pytest

from steer_server.caller import Caller
from steer_server.engine import fair_queue
from steer_server.engine.hf.memory import DecodeMemory
from steer_server.engine.hf.queue import JobQueue
from steer_server.errors import EngineFailedError, QueueFullError, ShuttingDownError
from steer_server.types import Admitted, DecodeJob, FinishReason, Row, SamplingParams


def make_queue(limit, **options):
    """That decodes one job at once, if not otherwise."""
    return JobQueue(limit, **{"max_running": 1, **options})


def _job(client="a", *, host="h", **sampling):
    return DecodeJob.of((1, 2), SamplingParams(**sampling), (Row(),), caller=Caller(host, client))


def _take(queue):
    """The next job, once the one before has ended."""
    for running in queue._jobs.running:
        queue.end(running, 1.0)
    return queue.take(wait=False)


async def _drain(stream):
    return [event async for event in stream]


async def test_jobs_leave_in_the_order_in_which_they_came():
    queue = make_queue(3)
    put = [queue.put(_job()) for _ in range(3)]
    assert [_take(queue) for _ in range(3)] == put


async def test_no_more_jobs_wait_than_are_admitted():
    queue = make_queue(2)
    queue.put(_job())
    queue.put(_job())
    with pytest.raises(QueueFullError) as caught:
        queue.put(_job())
    assert caught.value.retry_after >= 0.5
    assert "2 requests wait" in str(caught.value)
    assert len(queue) == 2


async def test_the_running_job_does_not_count_as_waiting():
    queue = make_queue(1)
    queue.put(_job())
    assert (queue.running, len(queue)) == (0, 1)
    queue.take(wait=False)
    assert (queue.running, len(queue)) == (1, 0)
    queue.put(_job())
    assert (queue.running, len(queue)) == (1, 1)


async def test_the_retry_hint_follows_how_long_jobs_take():
    queue = make_queue(1)
    first = queue.put(_job())
    queue.end(queue.take(wait=False), 30.0)
    first.cancel()
    queue.put(_job())
    with pytest.raises(QueueFullError) as caught:
        queue.put(_job())
    assert 18.0 <= caught.value.retry_after <= 30.0


async def test_a_waiting_job_that_is_cancelled_frees_its_place():
    queue = make_queue(2)
    first, second = queue.put(_job()), queue.put(_job())
    first.cancel()
    assert len(queue) == 1
    third = queue.put(_job())
    assert [_take(queue), _take(queue)] == [second, third]


async def test_cancelling_twice_or_after_the_end_does_nothing():
    queue = make_queue(1)
    queued = queue.put(_job())
    assert queue.take(wait=False) is queued
    queued.cancel()
    queued.cancel()
    assert queued.interruption() is FinishReason.CANCELLED
    assert len(queue) == 0


async def test_a_job_that_nobody_cancelled_is_not_interrupted():
    assert make_queue(1).put(_job()).interruption() is None


@pytest.fixture
def clock(monkeypatch):
    """The time that jobs are measured by; a test moves it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("steer_server.engine.hf.queue.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


async def test_a_time_limit_runs_out_from_the_moment_of_admission(clock):
    queued = make_queue(1).put(_job(time_limit=0.05))
    clock.now += 0.049
    assert queued.interruption() is None
    clock.now += 0.002
    assert queued.interruption() is FinishReason.TIME_LIMIT


async def test_being_cancelled_comes_before_running_out_of_time(clock):
    queued = make_queue(1).put(_job(time_limit=0.05))
    clock.now += 1.0
    queued.cancel()
    assert queued.interruption() is FinishReason.CANCELLED


async def test_events_come_in_order_and_the_stream_ends():
    queued = make_queue(1).put(_job())

    def work():
        queued.post(Admitted())
        queued.post(Admitted())
        queued.post(None)

    threading.Thread(target=work).start()
    assert await _drain(queued) == [Admitted(), Admitted()]


async def test_a_jobs_error_is_raised_to_its_reader():
    queued = make_queue(1).put(_job())
    queued.post(EngineFailedError("it broke"))
    with pytest.raises(EngineFailedError, match="it broke"):
        await _drain(queued)


async def test_closing_refuses_those_who_wait_and_stops_the_one_who_runs():
    queue = make_queue(2)
    running, waiting = queue.put(_job()), queue.put(_job())
    assert queue.take(wait=False) is running
    queue.close()
    assert running.interruption() is FinishReason.CANCELLED
    with pytest.raises(ShuttingDownError):
        await _drain(waiting)
    assert len(queue) == 0
    assert queue.take(wait=True) is None
    with pytest.raises(ShuttingDownError):
        queue.put(_job())


async def _waiting_for_work(queue):
    """A thread that takes a job, once it sleeps until there is one."""
    taken = asyncio.ensure_future(asyncio.to_thread(queue.take, wait=True))
    async with asyncio.timeout(10):
        while not queue._changed._waiters:
            await asyncio.sleep(0.001)
    assert not taken.done()
    return taken


async def test_closing_wakes_a_thread_that_waits_for_work():
    queue = make_queue(1)
    taken = await _waiting_for_work(queue)
    queue.close()
    assert await asyncio.wait_for(taken, 10) is None


async def test_a_thread_that_waits_for_work_is_woken_for_it(monkeypatch):
    queue, waits = make_queue(1), []
    wait = queue._changed.wait
    monkeypatch.setattr(queue._changed, "wait", lambda timeout: waits.append(timeout) or wait(timeout))
    taken = await _waiting_for_work(queue)
    queued = queue.put(_job())
    assert await asyncio.wait_for(taken, 10) is queued
    # It does not look now and then.
    assert waits == [None]


def test_posting_after_the_loop_has_ended_stops_the_job():
    async def put():
        return make_queue(1).put(_job())

    queued = asyncio.run(put())
    queued.post(Admitted())
    assert queued.interruption() is FinishReason.CANCELLED


async def test_a_job_whose_time_runs_out_while_it_waits_ends_without_the_engine_and_frees_its_place():
    queue = make_queue(2)
    queue.put(_job())
    queue.take(wait=False)
    queued = queue.put(_job(time_limit=0.05))
    [end] = await asyncio.wait_for(_drain(queued), 2)
    assert (end.row, end.reason, end.text, end.receipts) == (0, FinishReason.TIME_LIMIT, "", ())
    assert len(queue) == 0


async def test_a_job_taken_just_before_its_time_runs_out_is_the_engines_to_end():
    queue = make_queue(1)
    queued = queue.put(_job(time_limit=0.05))
    queue.take(wait=False)
    drained = asyncio.ensure_future(_drain(queued))
    await asyncio.sleep(0.1)
    queued.post(Admitted())
    queued.post(None)
    assert await asyncio.wait_for(drained, 2) == [Admitted()]


async def test_a_job_that_runs_is_given_up_by_its_reader_when_the_engine_fails():
    queue = make_queue(2)
    running = queue.put(_job())
    assert queue.take(wait=False) is running
    queue.close(lambda: EngineFailedError("no device"))
    queue.abandon(EngineFailedError("no device"))
    with pytest.raises(EngineFailedError):
        await _drain(running)
    with pytest.raises(EngineFailedError, match="no device"):
        queue.put(_job())


async def test_the_client_with_the_fewest_running_is_next():
    queue = make_queue(16, max_running=8)
    many = [queue.put(_job("many")) for _ in range(8)]
    assert [queue.take(wait=False) for _ in range(3)] == [*many[:2], None]
    few = queue.put(_job("few"))
    assert [queue.take(wait=False) for _ in range(2)] == [few, None]
    queue.end(many[0], 1.0)
    other_host = queue.put(_job("other", host="other"))
    another = queue.put(_job("another"))
    assert [queue.take(wait=False) for _ in range(3)] == [other_host, another, many[2]]
    assert (queue.running, len(queue)) == (5, 5)


def _memory(budget):
    return DecodeMemory(budget=budget, per_token=1, per_row=0, context_length=100)


async def test_a_job_waits_until_there_is_memory_and_smaller_ones_pass_it_for_a_while(monkeypatch):
    queue = make_queue(8, max_running=8, memory=_memory(50))
    first, large, small = (
        queue.put(_job(name, max_tokens=tokens)) for name, tokens in (("a", 28), ("b", 38), ("c", 8))
    )
    assert [queue.take(wait=False) for _ in range(3)] == [first, small, None]
    small_again = queue.put(_job("d", max_tokens=8))
    monkeypatch.setattr(fair_queue, "PATIENCE", 0.0)
    assert queue.take(wait=False) is None
    queue.end(first, 1.0)
    assert [queue.take(wait=False) for _ in range(2)] == [large, None]
    queue.end(small, 1.0)
    assert queue.take(wait=False) is small_again


async def test_one_client_leaves_memory_to_the_others():
    queue = make_queue(8, max_running=8, memory=_memory(40))
    mine = [queue.put(_job("a", max_tokens=18)) for _ in range(2)]
    assert [queue.take(wait=False) for _ in range(2)] == [mine[0], None]
    others = queue.put(_job("b", max_tokens=18))
    assert queue.take(wait=False) is others
