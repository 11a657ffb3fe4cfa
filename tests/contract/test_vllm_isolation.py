"""Steered and plain requests never share keys and values; requests of the very same steering do."""

from __future__ import annotations

from functools import partial

import pytest
import pytest_asyncio

from steer_server.engine.hf.engine import HFEngine
from steer_server.engine.vllm.transfer import OperatorSender
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import Prompt, Row, SamplingParams

pytestmark = [pytest.mark.model, pytest.mark.vllm]

# More than two blocks of 32 tokens, so that there is a prefix to be found.
PROMPT = (
    "It was a long day in the museum, and we had seen a great many pictures: ships in a harbour, a street after the "
    "rain, two sisters at a window, a bowl of fruit, horses in the snow, and a king whose name nobody could read. In "
    "the last room there was only one, larger than all the others, and everybody stood in front of it. "
    "Here is a painting of the"
)
SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture
def operator(operator_of):
    return operator_of("The Golden Gate Bridge in San", "residual", 15)


@pytest_asyncio.fixture(loop_scope="session")
async def alone(smollm, decode):
    """``await alone(row)``: the ids of a row on the hf engine, which shares nothing between jobs."""
    engine = HFEngine(smollm(), max_queue=4)

    async def run(row):
        [(ids, _)] = await decode(engine, PROMPT, SAMPLING, row)
        return ids

    yield run
    await engine.close()


async def test_a_prefix_is_shared_by_requests_of_the_very_same_steering_only(
    vllm_engine, operator, operator_of, decode, steered_row, alone
):
    engine = await vllm_engine()
    other = operator_of("The wedding was beautiful and the bride", "residual", 15)
    rows = {
        "plain": Row(),
        "steered": steered_row(operator, 0.4),
        "stronger": steered_row(operator, 0.55),
        "blended": steered_row(operator, 0.4, blend=0.5),
        "substitute": steered_row(operator, 0.4, "substitute"),
        "first": steered_row(operator, 0.9, positions="first"),
        "generated": steered_row(operator, 0.4, positions="generated"),
        # Begins in what the cache has, and ends behind it.
        "range": steered_row(operator, 0.4, positions="40..80"),
        # The same name, as after a reload of the store.
        "replaced": steered_row(other, 0.4),
    }
    for name, row in rows.items():
        expected = await alone(row)
        [(first, end)] = await decode(engine, PROMPT, SAMPLING, row)
        [(again, repeated)] = await decode(engine, PROMPT, SAMPLING, row)
        assert first == again == expected, name
        if row.plan is not None:
            num_prompt = len(await engine.encode(Prompt(text=PROMPT)))
            count = partial(row.plan.applications[0].setting.positions.count, prompt_tokens=num_prompt)
            assert end.receipts[0].prompt_tokens_cached == 0, name
            # Whole blocks of 32 tokens.
            assert repeated.receipts[0].prompt_tokens_cached == count(0, 64), name
            for receipt in (end.receipts[0], repeated.receipts[0]):
                assert receipt.prompt_tokens_steered + receipt.prompt_tokens_cached == count(0, num_prompt)
                assert receipt.generated_tokens_steered == count(num_prompt, num_prompt + len(first) - 1)


async def test_what_a_failed_request_left_in_the_cache_is_not_found_again(
    vllm_engine, operator_of, decode, steered_row, alone
):
    engine = await vllm_engine()
    row = steered_row(operator_of("The capital of France is", "residual", 15), 0.4)
    artifact = row.plan.applications[0].artifact
    engine._operator_cache.room.add([artifact])
    await engine._operator_cache.load([artifact])
    # Gone behind the server's back: the request that follows runs without it.
    await engine._client.unload([artifact.digest])
    with pytest.raises(SteeringNotAppliedError, match=r"operator sha256:\w+ is not loaded"):
        await decode(engine, PROMPT, SAMPLING, row)
    await OperatorSender(engine._client.call).send(artifact)
    engine._operator_cache.room.remove([artifact])
    [(ids, end)] = await decode(engine, PROMPT, SAMPLING, row)
    assert end.receipts[0].prompt_tokens_cached == 0
    assert ids == await alone(row)
