"""Two workers give the ids of one, and a compiled model those of an eager one: a small random Llama with even heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import pytest_asyncio

from operators.build import BuildSpec, build_operator
from operators.concept import concept_from_text
from steer_server.engine.transfer import Sender
from steer_server.errors import EngineFailedError
from steer_server.types import Row, SamplingParams

PROMPTS = ("Here is the bridge", "the golden dress of the bride in the bay", "a")
SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)
SMALL = {"max_model_len": 256, "max_num_batched_tokens": 256}


@pytest.fixture
def rows(even, steered_row):
    _, loaded = even
    bridge, dress = (
        build_operator(BuildSpec((concept_from_text(text, loaded),), layer=layer, rank=rank), loaded)
        for text, layer, rank in (("the golden bridge", 2, 8), ("a dress for the bride", 3, "full"))
    )
    return Row(), steered_row(bridge, 0.8), steered_row(dress, 0.9, "substitute"), steered_row(dress, 0.7, blend=0.4)


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
        await Sender(two._rpc).send(replace(artifact, digest=f"sha256:{'0' * 64}"))
    with pytest.raises(EngineFailedError, match="2 tokens are to be scored; 0 and 0 states were kept"):
        await two.score("nobody", "nobody either", (1, 2))
    assert await two._rpc("steering_layers") == [4, 4]
    assert [state["arriving"] for state in await two._rpc("steering_state")] == [0, 0]
    [(ids, end)] = await decode(two, PROMPTS[0], SAMPLING, rows[1])
    assert end.receipts[0].generated_tokens_steered == len(ids) - 1


async def test_two_tensor_parallel_workers_and_a_compiled_model_give_the_ids_of_one_eager_worker(
    vllm_engine, even, two, rows, decode
):
    directory, loaded = even
    # One after the other: an engine that is asked for ends the one before.
    parallel = await ids_of(two, decode, rows)
    one = await vllm_engine(loaded, str(directory), **SMALL)
    expected = await ids_of(one, decode, rows)
    assert expected[0][0] != expected[0][1]
    assert parallel == expected
    compiled = await vllm_engine(loaded, str(directory), enforce_eager=False, **SMALL)
    assert await ids_of(compiled, decode, rows) == expected
