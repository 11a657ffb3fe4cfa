"""A job on vLLM, with an engine in its place that answers what a test tells it to."""

import asyncio
from dataclasses import replace

import pytest

from operators.core.apply import prepared_bytes
from steer_server.engine.vllm.cache_salts import CacheSalts
from steer_server.engine.vllm.operator_cache import OperatorCache
from steer_server.engine.vllm.operator_room import OperatorRoom
from steer_server.errors import EngineFailedError, ShuttingDownError, SlowReaderError, SteeringNotAppliedError
from steer_server.types import (
    FinishReason,
    Row,
)
from tests.server.engine.vllm.conftest import IDS, PROMPT, ends_of, events_of, over, settled


async def test_a_steered_text_ends_with_its_receipts_and_its_scores(engine, start, scored):
    tokens, [end] = await ends_of(start(scored))
    assert (tokens, end.reason) == (list(IDS), FinishReason.EOS)
    assert [(score.kl, score.plain_logprob) for score in end.scores] == [(0.25, -1.0)] * len(IDS)
    assert end.receipts[0].prompt_tokens_steered == len(PROMPT)
    assert end.receipts[0].generated_tokens_steered == len(IDS) - 1
    (_, prompt, settings, keep, alone), (_, read, plain, also, by_itself) = engine.streams
    assert (prompt, len(settings), keep, alone) == (PROMPT, 1, len(PROMPT) - 1, False)
    assert (read, plain, also, by_itself) == ((*PROMPT, *IDS[:-1]), (), len(PROMPT) - 1, True)
    await settled(engine)


# Ends.


@pytest.mark.parametrize("end", ["cancel", "stop", "by themselves"])
async def test_a_job_whose_rows_end_together_is_over_once(engine, start, end):
    gate = engine.gates[2] = asyncio.Event()
    job = start(Row(), Row(), Row())
    async with asyncio.timeout(5):
        while job.running < 3:
            await asyncio.sleep(0)
    if end == "by themselves":
        gate.set()
    else:
        getattr(job, end)()
    await over(engine, job)
    assert engine.over == [job]
    assert (job.running, job.waiting) == (0, 0)


async def test_a_job_of_many_rows_that_ends_leaves_the_operators_to_another_one(engine, start, steered, monkeypatch):
    artifact = steered.plan.applications[0].artifact
    there = []

    async def load(one):
        there.append(one.digest)

    async def unload(digests):
        for digest in digests:
            there.remove(digest)

    operator_cache = OperatorCache(load, unload, OperatorRoom(prepared_bytes(artifact)))

    def end_job(job, seconds):
        engine.over.append(job)
        operator_cache.room.remove(job.operators)

    monkeypatch.setattr(engine, "operator_cache", operator_cache)
    monkeypatch.setattr(engine, "end_job", end_job)
    engine.gates[2] = asyncio.Event()
    jobs = []
    for rows in (3, 1):
        operator_cache.room.add([artifact])
        jobs.append(start(*[steered] * rows, operators=[artifact]))
    async with asyncio.timeout(5):
        while sum(job.running for job in jobs) < 4:
            await asyncio.sleep(0)
    jobs[0].cancel()
    await over(engine, jobs[0])
    other = replace(artifact, digest="another")
    assert not operator_cache.room.fits([other])
    jobs[1].cancel()
    await over(engine, jobs[1])
    assert engine.over == jobs
    assert operator_cache.room.fits([other])


# Time limits.


async def test_a_time_limit_that_runs_out_while_operators_are_loaded_ends_the_row_without_tokens(
    engine, start, steered
):
    engine.gates["load"] = asyncio.Event()
    tokens, ends = await ends_of(start(steered, Row(), time_limit=0.1))
    late, plain = sorted(ends, key=lambda end: end.row)
    assert (late.reason, late.text, late.scores) == (FinishReason.TIME_LIMIT, "", ())
    assert (late.receipts[0].prompt_tokens_steered, late.receipts[0].max_dose) == (0, 0.0)
    # The row beside it has nothing to wait for.
    assert (plain.reason, tokens) == (FinishReason.EOS, list(IDS))
    assert len(engine.streams) == 1
    await settled(engine)


async def test_time_spent_loading_is_not_given_back(engine, start, steered):
    engine.gates |= {"load": asyncio.Event(), 2: asyncio.Event()}
    asyncio.get_running_loop().call_later(0.6, engine.gates["load"].set)
    began = asyncio.get_running_loop().time()
    engine.count = len(PROMPT) + 1
    tokens, [end] = await ends_of(start(steered, time_limit=0.8))
    # Given back, it would be 1.4.
    assert asyncio.get_running_loop().time() - began < 1.35
    assert (tokens, end.reason) == (list(IDS[:2]), FinishReason.TIME_LIMIT)
    await settled(engine)


@pytest.mark.parametrize("where", ["read", "score"])
async def test_a_time_limit_that_runs_out_while_a_text_is_scored_leaves_it_as_it_ended_and_unscored(
    engine, start, scored, where
):
    engine.gates[where] = asyncio.Event()
    tokens, [end] = await ends_of(start(scored, time_limit=0.1))
    assert (tokens, end.reason, end.scores) == (list(IDS), FinishReason.EOS, ())
    assert end.receipts[0].generated_tokens_steered == len(IDS) - 1
    await settled(engine)


async def test_a_text_that_the_time_limit_cut_is_not_scored_beyond_it(engine, start, scored):
    engine.gates[3] = asyncio.Event()
    engine.count = len(PROMPT) + 2
    tokens, [end] = await ends_of(start(scored, time_limit=0.1))
    assert (tokens, end.reason, end.scores) == (list(IDS[:3]), FinishReason.TIME_LIMIT, ())
    assert end.receipts[0].generated_tokens_steered == 2
    assert len(engine.streams) == 1
    await settled(engine)


async def test_a_job_whose_time_runs_out_before_it_begins_ends_without_vllm(engine, start, steered):
    tokens, ends = await ends_of(start(steered, Row(), begin=False, time_limit=0.05))
    assert [(end.row, end.reason, end.text) for end in ends] == [
        (0, FinishReason.TIME_LIMIT, ""),
        (1, FinishReason.TIME_LIMIT, ""),
    ]
    assert (ends[0].receipts[0].prompt_tokens_steered, ends[1].receipts) == (0, ())
    assert (tokens, engine.streams) == ([], [])


# Failures, and who learns of them.


async def test_a_job_that_is_stopped_before_it_begins_says_so(engine, start):
    job = start(Row(), begin=False)
    job.stop()
    with pytest.raises(ShuttingDownError):
        await events_of(job)
    assert (engine.streams, job.waiting) == ([], 0)


async def test_a_reader_that_does_not_read_is_given_up_and_its_rows_are_aborted(engine, start):
    engine.gates[3] = asyncio.Event()
    job = start(Row(), Row())
    job._outbox._max_bytes, job._outbox._patience = 1500, 0.05
    await over(engine, job)
    assert engine.over == [job]
    with pytest.raises(SlowReaderError):
        await events_of(job)


@pytest.mark.parametrize(
    ("failure", "count", "said"),
    [("layer 2 was not reached", None, "layer 2 was not reached"), ("", 3, "layer 2: 0 of 3 generated tokens were")],
)
async def test_a_row_that_was_not_steered_is_an_error_and_its_prefixes_are_forsaken(
    engine, start, steered, failure, count, said
):
    engine.failed["all"], engine.count = failure, count
    job = start(steered)
    with pytest.raises(SteeringNotAppliedError, match=said):
        await events_of(job)
    settings = engine.streams[0][2]
    assert engine.salts.of(settings) != CacheSalts().of(settings)
    await settled(engine)


@pytest.mark.parametrize("when", [2, "take"], ids=["while it decodes", "while its measurement is taken"])
async def test_a_row_that_failed_forsakes_its_prefixes_although_its_reader_has_gone(engine, start, steered, when):
    gate = engine.gates[when] = asyncio.Event()
    engine.failed["all"] = "layer 2 was not reached"
    job = start(steered)
    reader = asyncio.ensure_future(events_of(job))
    async with asyncio.timeout(5):
        while not engine.streams or (when == "take" and not engine.collector._collecting):
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    reader.cancel()
    job.cancel()
    await asyncio.sleep(0.01)
    gate.set()
    await settled(engine)
    settings = engine.streams[0][2]
    assert engine.salts.of(settings) != CacheSalts().of(settings)


async def test_a_job_that_is_stopped_while_operators_are_loaded_says_so(engine, start, steered):
    engine.gates["load"] = asyncio.Event()
    job = start(steered)
    asyncio.get_running_loop().call_later(0.05, job.stop)
    with pytest.raises(ShuttingDownError):
        await events_of(job)
    assert engine.streams == []
    await settled(engine)


async def test_an_operator_that_cannot_be_loaded_is_the_rows_error(engine, start, steered, monkeypatch):
    async def broken(artifacts):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "load", broken)
    with pytest.raises(EngineFailedError, match="out of memory"):
        await events_of(start(steered))
    await settled(engine)
