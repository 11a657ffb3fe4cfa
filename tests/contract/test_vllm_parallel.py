"""Two workers give the ids of one, and a compiled model those of an eager one: a small random Llama with even heads."""

from __future__ import annotations

import pytest

from operators.build import BuildSpec, build_operator
from operators.concept import concept_from_text
from steer_server.types import Row, SamplingParams

PROMPTS = ("Here is the bridge", "the golden dress of the bride in the bay", "a")
SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)


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


async def test_two_tensor_parallel_workers_and_a_compiled_model_give_the_ids_of_one_eager_worker(
    vllm_engine, even, rows, decode, monkeypatch
):
    directory, loaded = even
    small = {"max_model_len": 256, "max_num_batched_tokens": 256}
    one = await vllm_engine(loaded, str(directory), **small)
    expected = await ids_of(one, decode, rows)
    assert expected[0][0] != expected[0][1]
    compiled = await vllm_engine(loaded, str(directory), enforce_eager=False, **small)
    assert await ids_of(compiled, decode, rows) == expected
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    two = await vllm_engine(loaded, str(directory), tensor_parallel_size=2, **small)
    assert await ids_of(two, decode, rows) == expected
