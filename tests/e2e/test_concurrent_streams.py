"""Many streams on one server: none is lost, none is mixed up with another, and a cancelled one disturbs nobody."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio
from steer_client import AsyncSteerClient, OperatorUse, SamplingParams

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.store import Store

pytestmark = pytest.mark.model

PROMPTS = (
    "Here is a painting of the",
    "I went to new york to see the",
    "Yesterday we had dinner at",
    "x",
)
USES = (
    [],
    [OperatorUse("bridge", 0.55)],
    [OperatorUse("paris", 0.25)],
    [OperatorUse("bridge", -0.4)],
    [OperatorUse("paris", 0.2, "substitute", 0.5)],
    [],
    [OperatorUse("bridge", 0.3), OperatorUse("paris", 0.15)],
    [OperatorUse("bridge", 0.4, blend=1.0)],
)
STREAMS = [(PROMPTS[index % 4], USES[index % 8]) for index in range(32)]
SAMPLING = SamplingParams(max_tokens=12)
CLOSE_CALL = 1e-3
"""Two tokens whose log-probabilities are nearer than this may swap in float32."""


@pytest.fixture(scope="module")
def server(smollm, tmp_path_factory, start_server):
    directory = tmp_path_factory.mktemp("store")
    loaded = smollm()
    for name, text, layer in (
        ("bridge", "The Golden Gate Bridge in San", 21),
        ("paris", "The capital of France is", 24),
    ):
        spec = BuildSpec((concept_from_text(text, loaded),), "golden", layer)
        Store(directory).save(name, build_operator(spec, loaded))
    with start_server("--store", str(directory), "--dtype", "float32", model="smollm2-135m", metrics=True) as running:
        yield running


async def run(client, prompt, uses):
    """One stream's ids, with the gap between the two likeliest tokens at each."""
    sampling = SamplingParams(max_tokens=SAMPLING.max_tokens, logprobs=2)
    stream = client.stream(prompt, operators=uses, sampling=sampling, timeout=300)
    async with stream:
        async for _ in stream:
            pass
    result = stream.result
    gaps = [item.top[0].logprob - item.top[1].logprob for item in result.logprobs]
    return list(result.token_ids), gaps


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def solo(server):
    """The first eight streams, which are of every kind, one after the other."""
    async with AsyncSteerClient(server.target) as client:
        return [await run(client, *stream) for stream in STREAMS[:8]]


def same_but_for_close_calls(found, solo, gaps):
    for index, (a, b) in enumerate(zip(found, solo, strict=False)):
        if a != b:
            return gaps[index] < CLOSE_CALL
    return len(found) == len(solo)


async def test_32_mixed_streams_at_once_give_the_ids_of_their_solo_runs(server, solo):
    async with AsyncSteerClient(server.target) as client:
        together = await asyncio.gather(*(run(client, *stream) for stream in STREAMS))
    for index, (found, _) in enumerate(together):
        expected, gaps = solo[index % 8]
        assert same_but_for_close_calls(found, expected, gaps), STREAMS[index]
    server.wait_for_jobs(0, 0)


async def test_cancelling_8_of_32_streams_leaves_the_others_unchanged_and_nothing_running(server, solo):
    async with AsyncSteerClient(server.target) as client:

        async def leave(client, prompt, uses):
            stream = client.stream(
                prompt, operators=uses, sampling=SamplingParams(max_tokens=2000, ignore_eos=True), timeout=300
            )
            async with stream:
                async for _ in stream:
                    break

        leaving = {3, 7, 8, 13, 18, 22, 26, 31}
        results = await asyncio.gather(
            *((leave if index in leaving else run)(client, *stream) for index, stream in enumerate(STREAMS))
        )
        for index, result in enumerate(results):
            if index not in leaving:
                expected, gaps = solo[index % 8]
                assert same_but_for_close_calls(result[0], expected, gaps), STREAMS[index]
        server.wait_for_jobs(0, 0)
