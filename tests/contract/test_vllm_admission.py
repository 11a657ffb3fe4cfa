"""What finds no room waits, in fair turns, or is refused with a hint, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest
import pytest_asyncio
from steer_client import AsyncSteerClient, OperatorUse, ServerBusyError
from steer_client import SamplingParams as ClientSamplingParams

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.apply import prepared_bytes
from operators.core.defaults import PUBLISHED
from operators.core.store import Store
from operators.model.obtain import obtain
from steer_server.caller import Caller
from steer_server.config import ServerConfig
from steer_server.engine.vllm import transfer
from steer_server.engine.vllm.job_memory import JobMemory, StepSizes
from steer_server.errors import EngineFailedError, InvalidRequestError, OperatorUnusableError, QueueFullError
from steer_server.registry import Registry
from steer_server.rpc.server import SteerServer
from steer_server.types import DecodeJob, FinishReason, Row, RowFinished, SamplingParams, TokenEvent

PROMPT = (40, 41, 42, 43)
LONG = SamplingParams(max_tokens=8000, ignore_eos=True)
"""Longer than any test looks at it: all of them cancel it."""
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)
RUNNING, WAITING = 2, 2
TOKENS = 2048
SMALL = 4096
"""More than the running sums of any of these jobs."""
PUSHES = StepSizes(tokens=TOKENS, width=576, itemsize=4).pushes(1) + SMALL


pytestmark = [pytest.mark.model, pytest.mark.vllm]


@pytest.fixture(scope="module")
def made(smollm):
    """Three small operators."""
    loaded = smollm()
    texts = ("the golden bridge", "a golden dress", "here is the bay")
    concepts = [concept_from_text(text, loaded) for text in texts]
    return [
        build_operator(BuildSpec((concept,), layer=2, rank=4, recommended=PUBLISHED), loaded) for concept in concepts
    ]


@pytest.fixture(scope="module")
def large(smollm):
    """An operator that is larger than two of those."""
    loaded = smollm()
    return build_operator(
        BuildSpec((concept_from_text("a dress", loaded),), layer=2, rank="full", recommended=PUBLISHED), loaded
    )


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def engine(smollm, made):
    """Two texts run at once, two more wait; there is room for any two of the operators, not for three.

    Not on a tiny model: with steps of two milliseconds, on two cores, vLLM's processes wait so busily for each other
    that requests and answers lie about for seconds.
    """
    from steer_server.engine.vllm.engine import VLLMEngine

    options = {
        "enforce_eager": True,
        "max_model_len": 8192,
        "max_num_seqs": RUNNING,
        "max_num_batched_tokens": TOKENS,
    }
    engine = await VLLMEngine.start(
        smollm(),
        str(obtain("smollm2-135m")),
        dtype="float32",
        max_queue=WAITING,
        operator_memory=PUSHES + sum(sorted(map(prepared_bytes, made))[-2:]),
        engine_args=options,
    )
    yield engine
    await engine.close()


@pytest.fixture
def rows(made, steered_row):
    return [steered_row(artifact, 0.5) for artifact in made]


async def ids_of(stream):
    return [event.token_id async for event in stream if isinstance(event, TokenEvent)]


async def begun(engine, *jobs):
    """Streams of jobs of which every row has a token."""
    streams = [engine.submit(DecodeJob.of(PROMPT, LONG, rows)) for rows in jobs]
    async with asyncio.timeout(30):
        for stream in streams:
            # A job that fails says why here.
            await anext(aiter(stream))
        while engine.running < sum(map(len, jobs)):
            await asyncio.sleep(0.01)
    return streams


async def at_rest(engine, streams=()):
    """What the workers hold once all of it is over."""
    for stream in streams:
        stream.cancel()
    async with asyncio.timeout(30):
        while (engine.running, engine.waiting, await engine.num_held_requests()) != (0, 0, 0):
            await asyncio.sleep(0.01)
    [state] = await engine._client.call("steering_state")
    return state


async def test_more_than_run_and_wait_are_refused_with_a_hint_and_leave_nothing_behind(engine, rows):
    expected = await ids_of(engine.submit(DecodeJob.of(PROMPT, SHORT, (rows[0],))))
    before = await at_rest(engine)
    streams = await begun(engine, (rows[0],) * 2)
    streams += [engine.submit(DecodeJob.of(PROMPT, SHORT, (Row(), rows[1]))) for _ in range(WAITING)]
    assert (engine.running, engine.waiting) == (2, 4)
    for _ in range(3):
        with pytest.raises(QueueFullError, match="2 requests wait") as caught:
            engine.submit(DecodeJob.of(PROMPT, SHORT, (rows[1],)))
        assert caught.value.retry_after > 0
    # The operator of those that waited and were refused was never sent.
    assert await at_rest(engine, streams) == before
    assert await ids_of(engine.submit(DecodeJob.of(PROMPT, SHORT, (rows[0],)))) == expected


async def test_the_next_to_be_decoded_is_a_client_that_has_nothing_running_yet(engine):
    many, few = Caller("h", "many"), Caller("h", "few")
    [long] = await begun(engine, (Row(),))
    ended = []

    async def read(name, stream):
        await ids_of(stream)
        ended.append(name)

    tasks = []
    for number in range(2):
        job = DecodeJob.of(PROMPT, replace(SHORT, max_tokens=40), (Row(),), caller=many)
        tasks.append(asyncio.create_task(read(f"many {number}", engine.submit(job))))
    more = DecodeJob.of(PROMPT, SHORT, (Row(),), caller=many)
    tasks.append(asyncio.create_task(read("many 2", engine.submit(more))))
    tasks.append(asyncio.create_task(read("few", engine.submit(DecodeJob.of(PROMPT, SHORT, (Row(),), caller=few)))))
    await asyncio.gather(*tasks)
    # Of the two places the long text has one, and the first of the others came before "few".
    assert ended == ["many 0", "few", "many 1", "many 2"]
    await at_rest(engine, [long])


async def test_a_job_whose_operators_find_no_room_waits_until_others_are_done(engine, made, rows):
    streams = await begun(engine, (rows[0],), (rows[1],))
    [held] = await engine._client.call("steering_state")
    assert held["operators"] == 2
    waiting = engine.submit(DecodeJob.of(PROMPT, SHORT, (rows[2],)))
    streams[1].cancel()
    async with asyncio.timeout(30):
        while engine.running > 1:
            await asyncio.sleep(0.01)
    # There is a place now, and room for its operator.
    assert len(await ids_of(waiting)) == 4
    assert (await at_rest(engine, streams))["bytes"] <= sum(sorted(map(prepared_bytes, made))[-2:])


async def test_operators_that_would_never_fit_are_refused_for_good(engine, rows, large, steered_row):
    before = await at_rest(engine)
    with pytest.raises(OperatorUnusableError, match="--operator-memory"):
        engine.submit(DecodeJob.of(PROMPT, SHORT, (Row(), steered_row(large, 0.5))))
    with pytest.raises(InvalidRequestError, match=r"^operators: take .* in a worker; this server keeps"):
        engine.submit(DecodeJob.of(PROMPT, SHORT, tuple(rows)))
    assert await at_rest(engine) == before


async def test_an_operator_that_does_not_arrive_whole_leaves_nothing_in_the_workers(engine, made, monkeypatch):
    before = await at_rest(engine)
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 512)
    damaged = replace(made[0], digest=f"sha256:{'0' * 64}")
    with pytest.raises(EngineFailedError, match="it is damaged"):
        await transfer.OperatorSender(engine._client.call).send(damaged)
    sending = asyncio.ensure_future(transfer.OperatorSender(engine._client.call).send(damaged))
    async with asyncio.timeout(10):
        while not (await engine._client.call("steering_state"))[0]["incoming"]:
            await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert await at_rest(engine) == before
    assert before["incoming"] == 0


async def test_a_time_limit_that_runs_out_while_an_operator_arrives_ends_the_text_without_tokens(
    engine, rows, made, monkeypatch
):
    # As a job does: with the pushes of a step beside them there is room for no third operator.
    engine._operator_cache.room.add(made[1:], JobMemory(layers=1))
    await engine._operator_cache.load(made[1:])
    engine._operator_cache.room.remove(made[1:], JobMemory(layers=1))
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 64)
    limited = replace(SHORT, time_limit=0.05)
    *_, end = [event async for event in engine.submit(DecodeJob.of(PROMPT, limited, (rows[0],)))]
    assert isinstance(end, RowFinished)
    assert (end.reason, end.text, end.receipts[0].prompt_tokens_steered) == (FinishReason.TIME_LIMIT, "", 0)
    assert len(await ids_of(engine.submit(DecodeJob.of(PROMPT, SHORT, (rows[0],))))) == 4
    assert (await at_rest(engine))["incoming"] == 0


async def test_a_client_is_told_when_to_come_back_and_is_served_then(engine, made, rows, tmp_path):
    for name, artifact in zip("abc", made, strict=True):
        Store(tmp_path).save(name, artifact)
    registry = Registry(Store(tmp_path), engine.model, max_bytes=1 << 30, max_dose=1.0)
    server = SteerServer(engine, registry, ServerConfig(listen="127.0.0.1:0"))
    target = f"127.0.0.1:{await server.start()}"
    sampling = ClientSamplingParams(max_tokens=4, ignore_eos=True)
    try:
        async with AsyncSteerClient(target, timeout=60, retry=False) as client:
            streams = await begun(engine, (rows[0],), (rows[1],))
            streams += [engine.submit(DecodeJob.of(PROMPT, LONG, (Row(),))) for _ in range(WAITING)]
            # Two of other hosts may wait beside them.
            for host in "ab":
                streams += [engine.submit(DecodeJob.of(PROMPT, LONG, (Row(),), caller=Caller(host)))]
            with pytest.raises(ServerBusyError, match="4 requests wait") as caught:
                await client.generate("the bay", operators=[OperatorUse("c", 0.5)], sampling=sampling)
            assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert caught.value.retry_after > 0
            await at_rest(engine, streams)
            answer = await client.generate("the bay", operators=[OperatorUse("c", 0.5)], sampling=sampling)
            assert answer.receipts[0].generated_tokens_steered == 3
    finally:
        # Not stop(): that closes the engine, which others use.
        await server._listeners[0].server.stop(0)
