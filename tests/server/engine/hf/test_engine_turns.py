"""Several jobs at once: whose turn it is, what is refused, what is counted, and how the engine fails."""

import asyncio
import time

import pytest
import torch

from steer_server.access.grant import Grant
from steer_server.access.rates import Account, Charge
from steer_server.caller import Caller
from steer_server.engine.hf.engine import HFEngine
from steer_server.engine.hf.failure import is_lost
from steer_server.engine.hf.memory import DecodeMemory
from steer_server.errors import (
    EngineFailedError,
    InvalidRequestError,
    QueueFullError,
    RateLimitedError,
    ShuttingDownError,
    SlowReaderError,
)
from steer_server.job_run import JobRun
from steer_server.types import DecodeJob, FinishReason, Row, RowFinished, SamplingParams, TokenEvent

ALL = 400
"""Of the tokens that the tiny model takes, more than any test waits for."""


@pytest.fixture
async def engine(llama):
    made = HFEngine(llama, max_queue=8)
    yield made
    await made.close()


@pytest.fixture
def passes(llama):
    """The rows and tokens of every forward pass; ``passes.error`` is raised in the next one."""

    class Passes(list):
        error = None

        def __call__(self, module, args, kwargs):
            self.append(tuple(kwargs["input_ids"].shape))
            if self.error is not None:
                error, self.error = self.error, None
                raise error

    made = Passes()
    with llama.model.register_forward_pre_hook(made, with_kwargs=True):
        yield made


def _job(*rows, client="a", prompt=(1, 2), tokens=4, **sampling):
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, **sampling)
    return DecodeJob.of(prompt, params, rows or (Row(),), caller=Caller("h", client))


async def _events(stream):
    return [event async for event in stream]


async def _first_token(stream):
    """Reads until the first token; the stream goes on."""
    async for event in stream:
        if isinstance(event, TokenEvent):
            return


async def test_a_short_job_beside_a_long_one_waits_for_a_few_turns_only(engine, passes):
    long = engine.submit(_job(tokens=ALL, prompt=(1, 3, 5, 7)))
    await _first_token(long)
    before = len(passes)
    await _events(engine.submit(_job(client="b")))
    # Four of its own, and about as many of the other's: by time, which the machine may stretch.
    assert 4 <= len(passes) - before <= 40
    long.cancel()


async def test_a_call_of_many_jobs_gives_way_and_holds_no_more_places_than_its_share(engine):
    run = JobRun(engine, [_job(tokens=100, client="many") for _ in range(12)])
    ended, most, other = 0, 0, None
    async for event in run:
        most = max(most, engine.running + engine.waiting)
        ended += isinstance(event.event, RowFinished)
        if other is None and isinstance(event.event, TokenEvent):
            other = asyncio.ensure_future(_events(engine.submit(_job(client="b"))))
        if other is not None and other.done():
            break
    assert ended <= 2
    # Two of the call's own, and the other's.
    assert most <= 3
    run.cancel()
    async with asyncio.timeout(5):
        while engine.running + engine.waiting:
            await asyncio.sleep(0.01)


async def test_a_short_job_is_read_beside_many_of_another_client(engine, passes):
    many = [engine.submit(_job(tokens=ALL, client="many")) for _ in range(8)]
    await _first_token(many[0])
    # One of them may have ended by now, and another begun.
    assert engine.running == 4
    assert engine.waiting
    before = len(passes)
    await _events(engine.submit(_job(client="b")))
    assert 4 <= len(passes) - before <= 40
    for stream in many:
        stream.cancel()


async def test_what_a_job_needs_is_refused_with_the_figures_where_it_does_not_fit(llama, artifact, plan_of):
    memory = DecodeMemory.of(llama, None)
    config = llama.model.config
    assert memory.per_token == 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    engine = HFEngine(llama, max_queue=2, decode_memory=3 * (memory.per_row + 50 * memory.per_token))
    try:
        scored = Row(plan_of((artifact, 0.5)), score=True)
        with pytest.raises(
            InvalidRequestError, match=r"3 rows .* of up to 51 tokens take .*, enough for 40 tokens"
        ) as caught:
            engine.submit(_job(Row(), scored, prompt=(1,) * 10, tokens=41))
        assert caught.value.field == "sampling.max_tokens"
        events = await _events(engine.submit(_job(Row(), scored, prompt=(1,) * 10, tokens=40)))
        assert sum(isinstance(event, RowFinished) for event in events) == 2
    finally:
        await engine.close()


async def test_work_is_counted_also_for_clients_that_have_left(engine, artifact, plan_of, passes):
    rows = (Row(), Row(plan_of((artifact, 0.5))))
    stream = engine.submit(_job(*rows, prompt=(1,) * 7, tokens=ALL))
    await _first_token(stream)
    stream.cancel()
    while engine.running:
        await asyncio.sleep(0.01)
    steps = len(passes)
    assert 0 < steps < ALL
    assert engine.work.prompt_tokens == 7
    assert (engine.work.plain_tokens, engine.work.steered_tokens) == (steps, steps)


async def test_a_prompt_that_is_given_up_half_way_is_counted_as_far_as_it_was_read(engine, passes, monkeypatch):
    monkeypatch.setattr("steer_server.engine.hf.decode.prefill_positions", lambda _: 10)
    stream = engine.submit(_job(prompt=(1,) * 400))
    while not passes:
        await asyncio.sleep(0.001)
    stream.cancel()
    while engine.running:
        await asyncio.sleep(0.001)
    assert engine.work.prompt_tokens == 10 * len(passes) < 400
    assert engine.work.plain_tokens == 0


async def test_an_error_of_one_job_is_its_own(engine, passes):
    other = engine.submit(_job(client="b", tokens=100))
    await _first_token(other)
    passes.error = RuntimeError("the shapes do not fit")
    results = await asyncio.gather(_events(other), _events(engine.submit(_job(tokens=100))), return_exceptions=True)
    assert sorted(type(result) for result in results if isinstance(result, Exception)) == [EngineFailedError]
    assert len(await _events(engine.submit(_job()))) == 6


@pytest.mark.parametrize(
    "error",
    [torch.AcceleratorError("device-side assert triggered"), RuntimeError("CUDA error: an illegal memory access")],
    ids=["typed", "text"],
)
async def test_after_an_error_of_the_device_the_engine_has_failed_and_tells_all(engine, passes, monkeypatch, error):
    # Else the second might be done before the first has a second turn.
    monkeypatch.setattr("steer_server.engine.hf.turns._HEAD_START", 0.0)
    streams = [engine.submit(_job(client=name, tokens=ALL)) for name in "ab"]
    for stream in streams:
        await _first_token(stream)
    failed = asyncio.ensure_future(engine.failed())
    await asyncio.sleep(0)
    assert not failed.done()
    passes.error = error
    assert str(error) in await asyncio.wait_for(failed, 10)
    for stream in streams:
        with pytest.raises(EngineFailedError):
            await asyncio.wait_for(_events(stream), 10)
    with pytest.raises(EngineFailedError):
        engine.submit(_job())
    assert str(error) in await engine.failed()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA error: out of memory"), MemoryError(), ValueError("x"), KeyError("CUDA")]
)
def test_what_is_no_error_of_the_device_loses_nothing(error):
    assert not is_lost(error, torch.device("cpu"))


async def test_a_forward_pass_that_outlasts_the_close_ends_in_an_error_and_not_in_silence(llama, passes, monkeypatch):
    monkeypatch.setattr("steer_server.engine.hf.engine._TELL_SECONDS", 0.05)
    monkeypatch.setattr("steer_server.engine.hf.engine._CLOSE_SECONDS", 0.1)
    engine = HFEngine(llama, max_queue=2)
    with llama.model.register_forward_pre_hook(lambda module, args: time.sleep(0.7)):
        stream = engine.submit(_job(tokens=2))
        while not passes:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        await engine.close()
        assert time.monotonic() - began < 0.6
        with pytest.raises(ShuttingDownError):
            await _events(stream)
        engine._thread.join(5)


async def test_an_interrupted_job_ends_before_the_others_go_on(engine, passes):
    others = [engine.submit(_job(client=name, tokens=ALL)) for name in "abc"]
    limited = engine.submit(_job(client="limited", tokens=ALL, time_limit=0.3))
    *_, end = await asyncio.wait_for(_events(limited), 10)
    assert end.reason is FinishReason.TIME_LIMIT
    for stream in others:
        stream.cancel()


@pytest.fixture
def unread(engine):
    """A job of client "unread" that has been paused, for its reader has taken nothing."""

    async def make(patience=60.0, **sampling):
        stream = engine.submit(_job(client="unread", tokens=ALL, logprobs=20, **sampling))
        stream._outbox._max_bytes, stream._outbox._patience = 100_000, patience
        async with asyncio.timeout(10):
            while not stream.is_paused:
                await asyncio.sleep(0.001)
        return stream

    return make


async def test_nothing_is_decoded_for_a_reader_that_is_far_behind_until_it_has_caught_up(engine, unread):
    stream = await unread()
    await asyncio.sleep(0.1)
    decoded = engine.work.plain_tokens
    assert 20 < decoded < engine.model.context_length / 2
    # Others are served meanwhile.
    assert len(await _events(engine.submit(_job(client="b")))) == 6
    await asyncio.sleep(0.2)
    assert engine.work.plain_tokens == decoded + 4
    assert (engine.running, engine.undelivered) == (1, 0)
    events = await asyncio.wait_for(_events(stream), 10)
    assert sum(isinstance(event, TokenEvent) for event in events) == engine.model.context_length - 2
    assert (engine.running, engine.undelivered) == (0, 0)


async def test_who_does_not_read_is_given_up_and_the_job_ends(engine, unread):
    stream = await unread(patience=0.2)
    async with asyncio.timeout(10):
        while engine.running:
            await asyncio.sleep(0.01)
    assert engine.work.plain_tokens < engine.model.context_length / 2
    assert engine.undelivered == 1
    with pytest.raises(SlowReaderError):
        await _events(stream)
    assert engine.undelivered == 0


async def test_a_paused_job_ends_at_its_time_limit(engine, unread):
    stream = await unread(time_limit=1.0)
    async with asyncio.timeout(10):
        while engine.running:
            await asyncio.sleep(0.01)
    assert engine.work.plain_tokens < engine.model.context_length / 2
    *_, end = await _events(stream)
    assert end.reason is FinishReason.TIME_LIMIT


async def test_paused_jobs_do_not_hold_up_the_close(engine, unread):
    stream = await unread()
    began = time.monotonic()
    await engine.close()
    assert time.monotonic() - began < 1
    *_, end = await _events(stream)
    assert end.reason is FinishReason.CANCELLED


async def test_texts_that_nobody_reads_count_until_they_are_read(engine):
    streams = [engine.submit(_job()) for _ in range(8)]
    async with asyncio.timeout(10):
        while engine.undelivered < 8:
            await asyncio.sleep(0.01)
    assert (engine.running, engine.waiting) == (0, 0)
    with pytest.raises(QueueFullError, match="8 requests wait or are unread, 8 of them yours"):
        engine.submit(_job())
    assert len(await _events(streams[0])) == 6
    assert len(await _events(engine.submit(_job()))) == 6
    for stream in streams[1:]:
        stream.cancel()
    assert engine.undelivered == 0


@pytest.mark.parametrize("forced", [(), (5,) * 20], ids=["generated", "given"])
async def test_what_was_computed_is_charged_whether_or_not_anybody_takes_it(engine, forced):
    account = Account("one", tokens_per_minute=100, clock=lambda: 0.0)
    charge = Charge(account)
    rows = (Row(score=True), Row(score=True)) if forced else (Row(), Row())
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    charge.reserve(60, "max_tokens")
    caller = Caller("h", "c", grant=Grant(charge=charge))
    stream = engine.submit(DecodeJob.of((1, 2), sampling, rows, forced_ids=forced, caller=caller))
    async with asyncio.timeout(20):
        while engine.running or engine.waiting:
            await asyncio.sleep(0.01)
    # Nobody has taken an event of it.
    stream.cancel()
    charge.settle()
    account.reserve(60, "max_tokens")
    with pytest.raises(RateLimitedError):
        account.reserve(1, "max_tokens")


async def test_what_never_began_is_charged_nothing(engine):
    account = Account("one", tokens_per_minute=100, clock=lambda: 0.0)
    charge = Charge(account)
    charge.reserve(100, "max_tokens")
    running = engine.submit(_job(tokens=ALL))
    caller = Caller("h", "c", grant=Grant(charge=charge))
    waiting = engine.submit(DecodeJob.of((1, 2), SamplingParams(max_tokens=100), (Row(),), caller=caller))
    waiting.cancel()
    charge.settle()
    account.reserve(100, "max_tokens")
    running.cancel()
