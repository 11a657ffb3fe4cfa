"""What a job takes of a worker beside its operators, known before it is admitted. Sizes are worked out by hand."""

import asyncio

import pytest

from operators.core.apply import prepared_bytes
from steer_server.engine.fit import fitted
from steer_server.engine.vllm.job_memory import JobMemory, StepSizes, job_memory
from steer_server.engine.vllm.memory import CHUNK_BYTES, SCORE_BYTES
from steer_server.engine.vllm.operator_cache import OperatorCache, required_operators
from steer_server.engine.vllm.operator_room import OperatorRoom
from steer_server.engine.vllm.worker_protocol import positions_per_call
from steer_server.errors import InvalidRequestError, OperatorUnusableError
from steer_server.types import DecodeJob, Report, Row, SamplingParams

GIB, MIB = 1 << 30, 1 << 20
SIZES = StepSizes(tokens=8192, width=4096, itemsize=2)
CHUNKS = 12 * CHUNK_BYTES + 8 * SCORE_BYTES


def job(*rows, max_tokens=100, prompt=10):
    return DecodeJob.of(tuple(range(prompt)), SamplingParams(max_tokens=max_tokens), rows)


def test_pushes_grow_with_layers_and_not_with_operators():
    assert SIZES.pushes(0) == 0
    # T d numbers: embeddings of 2 and 4 bytes, then 4 bytes of each layer, and a kibibyte per row for what is measured.
    assert SIZES.pushes(1) == 8192 * 4096 * 6 + 8192 * (4096 * 4 + 1024) + CHUNKS
    assert SIZES.pushes(16) - SIZES.pushes(15) == 136 * MIB
    # All at once, 16 operators at one layer took 16 GiB.
    assert SIZES.pushes(1) < 512 * MIB


def test_a_job_takes_the_layers_of_its_widest_row_and_what_its_scores_keep(made, plan_of, other_layer):
    low, high = plan_of((made, 0.5), (made, 0.2)), plan_of((made, 0.5), (other_layer, 0.5), (made, 0.0))
    found = job_memory(job(Row(), Row(low), Row(high)), SIZES, budget=GIB, context_length=4096)
    sums = 2 * 4 * 4 * made.factors.shape[1]
    assert found == JobMemory(layers=2, held=sums)
    scored = job(Row(score=True), Row(low, score=True), Row(high, score=True))
    # Two texts and their plain twins, 100 states of 4096 numbers of 2 bytes each. The plain row's own are not kept.
    expected = 2 * 2 * 100 * 4096 * 2 + sums
    assert job_memory(scored, SIZES, budget=GIB, context_length=4096).held == expected
    # No more than the context has room for.
    short = job_memory(scored, SIZES, budget=GIB, context_length=60).held
    assert short == 2 * 2 * 50 * 4096 * 2 + sums
    assert job_memory(job(Row(), Row(plan_of((made, 0.0)))), SIZES, budget=1, context_length=60) == JobMemory()


def test_a_given_text_is_kept_once_by_every_row_and_the_plain_one(made, plan_of):
    plan = plan_of((made, 0.5))
    rows = (Row(score=True), Row(plan, score=True), Row(plan, score=True))
    given = DecodeJob.of((1,) * 10, SamplingParams(max_tokens=100), rows, forced_ids=(5,) * 100)
    sums = 2 * 2 * 4 * made.factors.shape[1]
    assert job_memory(given, SIZES, budget=GIB, context_length=4096) == JobMemory(1, 3 * 100 * 4096 * 2 + sums)
    alone = DecodeJob.of((1,) * 10, SamplingParams(max_tokens=100), rows[:1], forced_ids=(5,) * 100)
    # Logits are made of the plain text's states as well.
    assert job_memory(alone, SIZES, budget=GIB, context_length=4096) == JobMemory(0, 100 * 4096 * 2 + 8 * SCORE_BYTES)


def test_a_plain_text_is_kept_where_the_probability_of_words_is_reported():
    row = Row(score=True, report=Report(top=3, words=((5,),)))
    assert job_memory(job(row), SIZES, budget=GIB, context_length=4096).held == 2 * 100 * 4096 * 2
    own = Row(score=True, report=Report(top=3))
    assert job_memory(job(own), SIZES, budget=GIB, context_length=4096).held == 0


def test_a_scored_text_of_no_given_length_is_as_long_as_its_states_fit():
    sampling = SamplingParams(max_tokens=4000, fit_max_tokens=True)
    row = Row(score=True, report=Report(top=3, words=((5,),)))

    def check(job):
        return job_memory(job, SIZES, budget=2 * 300 * 4096 * 2, context_length=4096)

    found = fitted(DecodeJob.of((1,) * 10, sampling, (row,)), check)
    assert found.rows[0].sampling.max_tokens == 300


def test_what_alone_takes_too_much_is_refused_by_name(made, plan_of, other_layer):
    plan = plan_of((made, 0.5), (other_layer, 0.5))
    with pytest.raises(InvalidRequestError, match=r"push at 2 layers.*--operator-memory") as caught:
        job_memory(job(Row(plan)), SIZES, budget=SIZES.pushes(2) - 1, context_length=4096)
    assert caught.value.field == "operators"
    long = job(*[Row(plan, score=True)] * 16, max_tokens=8000)
    with pytest.raises(
        InvalidRequestError, match=r"scores of 16 texts of up to 8000 tokens.*--operator-memory"
    ) as caught:
        job_memory(long, SIZES, budget=2 * GIB, context_length=1 << 17)
    assert caught.value.field == "sampling.max_tokens"


def test_operators_find_room_beside_pushes_and_states_or_are_refused(made, plan_of):
    size, wanted = prepared_bytes(made), job(Row(plan_of((made, 0.5))))
    assert required_operators(wanted, budget=size + 100, pushes=60, held=40)
    with pytest.raises(InvalidRequestError, match="pushes take 60 bytes, kept hidden states 41 bytes"):
        required_operators(wanted, budget=size + 100, pushes=60, held=41)
    with pytest.raises(OperatorUnusableError):
        required_operators(wanted, budget=size + 59, pushes=60)


@pytest.fixture
def made(make_operator):
    return make_operator(1, 4, seed=1)


@pytest.fixture
def other_layer(make_operator, remake):
    made = make_operator(1, 4, seed=2)
    return remake(made, layer=made.header.layer + 1, injection_layer=made.header.injection_layer + 1)


@pytest.fixture
def unloaded():
    return []


@pytest.fixture
def cache(unloaded, made):
    """Room for two operators, or one and the pushes of a layer."""

    async def load(_artifact):
        await asyncio.sleep(0)

    async def unload(digests):
        unloaded.extend(digests)

    size = prepared_bytes(made)
    return OperatorCache(load, unload, OperatorRoom(2 * size, lambda layers: layers * size))


async def test_jobs_that_run_share_the_pushes_of_a_step_and_each_holds_its_own_states(cache, made):
    size = prepared_bytes(made)
    room = cache.room
    for _ in range(2):
        assert room.fits([made], JobMemory(layers=1))
        room.add([made], JobMemory(layers=1))
    assert not room.fits([made], JobMemory(layers=1, held=1))
    assert not room.fits([made], JobMemory(layers=2))
    for _ in range(2):
        room.remove([made], JobMemory(layers=1))
    # All of it came back.
    assert room.fits([], JobMemory(layers=2))
    assert room.fits([], JobMemory(held=2 * size))


async def test_operators_that_nobody_uses_make_room_for_pushes_and_states(cache, made, other_layer, unloaded):
    cache.room.add([made, other_layer])
    await cache.load([made, other_layer])
    cache.room.remove([made, other_layer])
    assert cache.num_bytes == 2 * prepared_bytes(made)
    cache.room.add([made], JobMemory(layers=1))
    await cache.load([made])
    assert unloaded == [other_layer.digest]
    assert cache.num_bytes == prepared_bytes(made)


def test_scores_are_made_of_as_many_positions_as_the_vocabulary_allows():
    assert [positions_per_call(size) for size in (32_000, 49_152, 262_144, 1 << 30)] == [64, 64, 12, 1]
