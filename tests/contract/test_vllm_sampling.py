"""What vLLM makes of a request's sampling: every field reaches it, and what it would refuse is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import pytest_asyncio

from steer_server.errors import InvalidRequestError, QueueFullError
from steer_server.types import DecodeJob, Row, SamplingParams

pytestmark = [pytest.mark.model, pytest.mark.vllm]

PROMPT = "The bridge over the bay is"
GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)
RANDOM = replace(GREEDY, temperature=1.0, seed=7)


@pytest_asyncio.fixture(loop_scope="session")
async def ids(vllm_engine, decode):
    """``await ids(sampling)``: the tokens that the engine chooses."""
    engine = await vllm_engine()

    async def run(sampling):
        [(found, _)] = await decode(engine, PROMPT, sampling, Row())
        assert len(found) == sampling.max_tokens
        return found

    return run


@pytest.mark.parametrize("seed", [7, 2**63, 2**64 - 1])
async def test_a_seed_repeats_itself_and_another_one_does_not_repeat_it(ids, seed):
    first = await ids(replace(RANDOM, seed=seed))
    assert await ids(replace(RANDOM, seed=seed)) == first
    assert await ids(replace(RANDOM, seed=seed - 3)) != first


async def test_temperature_decides_between_the_likeliest_tokens_and_others(ids):
    greedy, random = await ids(GREEDY), await ids(RANDOM)
    assert await ids(replace(GREEDY, seed=8)) == greedy
    assert random != greedy
    assert await ids(replace(RANDOM, temperature=2.0)) != random


@pytest.mark.parametrize("narrowed", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
async def test_sampling_of_one_token_is_greedy(ids, narrowed):
    assert await ids(replace(RANDOM, **narrowed)) == await ids(GREEDY)


async def test_a_penalty_for_repetition_changes_a_greedy_text(ids):
    assert await ids(replace(GREEDY, repetition_penalty=1.8)) != await ids(GREEDY)


# What is refused.


def _job(*rows, **sampling):
    return DecodeJob.of((40, 41, 42), replace(GREEDY, **sampling), rows)


async def test_what_vllm_would_refuse_or_replace_is_refused_when_it_is_submitted(vllm_engine, monkeypatch):
    engine = await vllm_engine()
    monkeypatch.setattr(engine._client._llm.model_config, "max_logprobs", 5)
    size = engine.model.vocab_size
    refused = {"temperature": 2.5, "logprobs": 6, "stop_token_ids": (size,)}
    for name, value in refused.items():
        with pytest.raises(InvalidRequestError, match=rf"sampling\.{name}\b"):
            engine.submit(_job(Row(), **{name: value}))
    assert engine.running + engine.waiting == 0


async def test_a_full_queue_of_vllms_own_is_no_failure_of_the_engine(vllm_engine, ids, monkeypatch):
    engine = await vllm_engine()
    with monkeypatch.context() as patch:
        patch.setattr(engine._client._llm.scheduler_config, "max_num_queued_reqs", 1)
        job = engine.submit(_job(Row(), Row()))
        with pytest.raises(QueueFullError, match="max_num_queued_reqs") as caught:
            async for _ in job:
                pass
        assert caught.value.retry_after >= 1.0
        job.cancel()
        await job.wait()
    assert len(await ids(GREEDY)) == GREEDY.max_tokens
