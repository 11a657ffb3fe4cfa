"""Two workers give the ids of one, and a compiled model those of an eager one: a small random Llama with even heads."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import pytest_asyncio

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.defaults import PUBLISHED
from operators.model.unembedding import find_unembedding
from operators.model.words import word_operator
from steer_server.engine.vllm.transfer import OperatorSender
from steer_server.errors import EngineFailedError
from steer_server.types import DecodeJob, Row, SamplingParams, TokenEvent

pytestmark = pytest.mark.vllm

PROMPTS = ("Here is the bridge", "the golden dress of the bride in the bay", "a")
SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)
SMALL = {"max_model_len": 4096, "max_num_batched_tokens": 256}


@pytest.fixture
def rows(even, steered_row, make_random_lens):
    directory, loaded = even
    lens, unembedding = make_random_lens(loaded), find_unembedding(str(directory))
    words = word_operator(lens, {"bridge": 1.0, "the": -0.5}, unembedding, loaded.tokenizer)
    bridge, dress = (
        build_operator(
            BuildSpec((concept_from_text(text, loaded),), layer=layer, rank=rank, recommended=PUBLISHED), loaded
        )
        for text, layer, rank in (("the golden bridge", 2, 8), ("a dress for the bride", 3, "full"))
    )
    return (
        Row(),
        steered_row(bridge, 0.8),
        steered_row(dress, 0.9, "substitute"),
        steered_row(dress, 0.7, blend=0.4),
        steered_row(bridge, 1.2, positions="first"),
        steered_row(dress, 0.9, positions="generated:2..12"),
        steered_row(words, 1.4, blend=1.0, positions="first"),
    )


async def ids_of(engine, decode, rows):
    return [[ids for ids, _ in await decode(engine, prompt, SAMPLING, *rows)] for prompt in PROMPTS]


@pytest_asyncio.fixture(loop_scope="session")
async def two(vllm_engine, even, monkeypatch):
    """Two workers, each on a core of its own."""
    directory, loaded = even
    with monkeypatch.context() as environment:
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        return await vllm_engine(loaded, str(directory), tensor_parallel_size=2, **SMALL)


async def test_a_call_that_workers_cannot_answer_leaves_the_answers_to_the_next_ones_in_order(two, rows, decode):
    artifact = rows[1].plan.applications[0].artifact
    with pytest.raises(EngineFailedError, match="it is damaged"):
        await OperatorSender(two._client.call).send(replace(artifact, digest=f"sha256:{'0' * 64}"))
    with pytest.raises(EngineFailedError, match="2 tokens are to be scored; 0 and 0 states were kept"):
        await two._client.score("nobody", "nobody either", (1, 2))
    assert await two._client.call("steering_layers") == [4, 4]
    assert [state["incoming"] for state in await two._client.call("steering_state")] == [0, 0]
    [(ids, end)] = await decode(two, PROMPTS[0], SAMPLING, rows[1])
    assert end.receipts[0].generated_tokens_steered == len(ids) - 1


async def test_what_any_worker_holds_of_a_request_is_told_and_goes_with_it(two, rows, monkeypatch):
    kinds = ("requests", "keys", "kept_states", "steered")
    sampling = replace(SAMPLING, max_tokens=4000)
    stream = two.submit(DecodeJob.of((1, 2, 3), sampling, (Row(rows[1].plan, score=True),)))
    async for event in stream:
        if isinstance(event, TokenEvent):
            break
    for state in await two._client.call("steering_state"):
        assert {kind: state[kind] for kind in kinds} == dict.fromkeys(kinds, 1)
    stream.cancel()
    async with asyncio.timeout(20):
        while await two.num_held_requests() != 0:
            await asyncio.sleep(0.01)
    states = await two._client.call("steering_state")
    for kind in kinds:

        async def leaky(_method, kind=kind):
            return [states[0], {**states[1], kind: 3}]

        monkeypatch.setattr(two._client, "call", leaky)
        assert await two.num_held_requests() == 3


async def test_workers_that_give_no_answer_are_not_waited_for_for_ever(two, monkeypatch):
    from steer_server.engine.vllm import client

    async def silent(*_args, **_options):
        await asyncio.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(two._client._llm, "collective_rpc", silent)
        patched.setattr(client, "_CALL_SECONDS", 0.1)
        with pytest.raises(EngineFailedError, match=r"steering_take: the workers gave no answer in 0\.1 seconds"):
            await asyncio.wait_for(two._client.call("steering_take", []), 5)
    assert await two._client.call("steering_take", []) == [[], []]


async def test_two_tensor_parallel_workers_and_a_compiled_model_give_the_ids_of_one_eager_worker(
    vllm_engine, even, two, rows, decode
):
    directory, loaded = even
    # One after the other: an engine that is asked for ends the one before.
    parallel = await ids_of(two, decode, rows)
    one = await vllm_engine(loaded, str(directory), **SMALL)
    expected = await ids_of(one, decode, rows)
    assert all(plain != steered for plain, *rows in expected for steered in rows)
    assert parallel == expected
    compiled = await vllm_engine(loaded, str(directory), enforce_eager=False, **SMALL)
    assert await ids_of(compiled, decode, rows) == expected
