"""Whatever vLLM's scheduler does to a request, its ids are those of an undisturbed run."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

import pytest
from prometheus_client import REGISTRY

from steer_server.types import DecodeJob, Prompt, Row, RowFinished, SamplingParams, TokenEvent

pytestmark = [pytest.mark.model, pytest.mark.vllm]

PROMPTS = (
    "Here is a painting of the",
    "I went to new york to see the",
    "The three most important things in life are",
    "My favourite place in the whole world, and I have been to a great many places, is without any doubt the",
)
SAMPLING = SamplingParams(max_tokens=48, ignore_eos=True)


@pytest.fixture
def rows(operator_of, steered_row):
    """Plain and steered ones of several operators, layers, rules, blends and positions."""
    bridge = operator_of("The Golden Gate Bridge in San", "residual", 15)
    wedding = operator_of("The wedding was beautiful and the bride", "residual", 21)
    published = operator_of("The Golden Gate Bridge in San", "golden", 21, "full")
    return (
        Row(),
        steered_row(bridge, 0.4),
        steered_row(wedding, 0.3, blend=0.5),
        steered_row(bridge, 0.3, "substitute"),
        steered_row(published, 0.5),
        steered_row(bridge, 0.9, positions="first"),
        # Begins in a chunk of one prompt, before or behind the others, and ends in the text that is thrown out.
        steered_row(wedding, 0.6, blend=0.5, positions="7..40"),
    )


async def texts(engine, jobs, sampling=SAMPLING):
    """The ids of every row of every job, all jobs at once."""

    async def one(prompt, row):
        ids = []
        async for event in engine.submit(DecodeJob.of(await engine.encode(Prompt(text=prompt)), sampling, (row,))):
            if isinstance(event, TokenEvent):
                ids.append(event.token_id)
            elif isinstance(event, RowFinished) and row.plan is not None:
                [use], [receipt] = row.plan.applications, event.receipts
                prompt_tokens = len(await engine.encode(Prompt(text=prompt)))
                fed = prompt_tokens + sampling.max_tokens - 1
                count = partial(use.setting.positions.count, prompt_tokens=prompt_tokens)
                assert receipt.prompt_tokens_steered + receipt.prompt_tokens_cached == count(0, prompt_tokens)
                assert receipt.generated_tokens_steered == count(prompt_tokens, fed)
        return ids

    return await asyncio.gather(*(one(prompt, row) for prompt, row in jobs))


async def test_preempted_and_chunked_requests_give_the_ids_of_an_undisturbed_run(vllm_engine, rows):
    jobs = [(prompt, row) for prompt in PROMPTS for row in rows]
    calm, sampling, undisturbed = await vllm_engine(), replace(SAMPLING, max_tokens=36), preemptions()
    expected = await texts(calm, jobs, sampling)
    before = preemptions()
    assert before == undisturbed
    # 10 blocks of 32 tokens for 28 texts of 43 to 58, and 24 tokens a step: prompts are cut, texts are thrown out.
    crowded = await vllm_engine(
        num_gpu_blocks_override=11, max_num_batched_tokens=24, max_num_seqs=16, max_model_len=96
    )
    assert await texts(crowded, jobs, sampling) == expected
    assert preemptions() > before
    assert await crowded.num_held_requests() == 0


def preemptions():
    families = [family for family in REGISTRY.collect() if family.name == "vllm:num_preemptions"]
    return sum(sample.value for family in families for sample in family.samples if sample.name.endswith("_total"))


async def test_10_abandoned_of_100_requests_leave_the_others_and_the_workers_alone(vllm_engine, rows):
    engine, sampling = await vllm_engine(), replace(SAMPLING, max_tokens=24)
    pairs = [(prompt, row) for prompt in PROMPTS for row in rows[:5]]
    expected = dict(zip(pairs, await texts(engine, pairs, sampling), strict=True))
    jobs = pairs * 5
    # Of every prompt and every kind of row; after so many tokens, from none at all to the last but one.
    leaving = {index: index * 23 // 99 for index in range(0, 100, 11)}
    staying = [job for index, job in enumerate(jobs) if index not in leaving]
    assert (len(leaving), len(staying)) == (10, 90)

    async def abandon(prompt, row, tokens):
        stream = engine.submit(DecodeJob.of(await engine.encode(Prompt(text=prompt)), sampling, (row,)))
        seen = 0
        if tokens:
            async for event in stream:
                seen += isinstance(event, TokenEvent)
                if seen == tokens:
                    break
        stream.cancel()

    found, *_ = await asyncio.gather(
        texts(engine, staying, sampling), *(abandon(*jobs[index], tokens) for index, tokens in leaving.items())
    )
    assert found == [expected[job] for job in staying]
    async with asyncio.timeout(20):
        while (engine.running, engine.waiting, await engine.num_held_requests()) != (0, 0, 0):
            await asyncio.sleep(0.1)


async def test_a_long_text_is_scored_in_pieces_between_which_others_are_decoded(
    vllm_engine, operator_of, steered_row, monkeypatch
):
    engine = await vllm_engine()
    silent = steered_row(operator_of("The Golden Gate Bridge in San", "residual", 15), 0.0)
    asked, call = [], engine._client.call

    async def watched(method, *args):
        if method == "steering_score":
            asked.append((len(args[2]), args[3]))
        return await call(method, *args)

    monkeypatch.setattr(engine._client, "call", watched)
    job = DecodeJob.of(
        await engine.encode(Prompt(text=PROMPTS[0])),
        replace(SAMPLING, max_tokens=70),
        (Row(score=True), Row(silent.plan, score=True)),
    )
    scores = {event.row: event.scores async for event in engine.submit(job) if isinstance(event, RowFinished)}
    assert asked == [(64, 0), (6, 64)]
    # The plain row's are vLLM's own.
    own, ours = ([score.plain_logprob for score in scores[row]] for row in range(2))
    assert ours == pytest.approx(own, abs=2e-4)
    assert len(ours) == 70


async def test_three_rows_of_one_job_are_three_runs(vllm_engine, rows):
    engine = await vllm_engine()
    ids = [[], [], []]
    job = DecodeJob.of(await engine.encode(Prompt(text=PROMPTS[0])), SAMPLING, (rows[1],) * 3)
    async for event in engine.submit(job):
        if isinstance(event, TokenEvent):
            ids[event.row].append(event.token_id)
    assert ids == [(await texts(engine, [(PROMPTS[0], rows[1])]))[0]] * 3
