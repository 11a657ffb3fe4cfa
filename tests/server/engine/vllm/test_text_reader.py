"""A given text, read by the rows of a job on vLLM."""

import asyncio

import pytest

from steer_server.errors import ShuttingDownError, SteeringNotAppliedError
from steer_server.types import (
    FinishReason,
    Row,
    RowFinished,
    TokenEvent,
)
from tests.server.engine.vllm.conftest import IDS, PROMPT, events_of, over, settled


async def test_a_given_text_is_read_once_by_every_arm_and_once_by_the_plain_ones(engine, start, scored, silent):
    job = start(Row(score=True), scored, silent, text=IDS)
    events = await events_of(job)
    tokens = [(event.row, event.token_id, event.score.kl) for event in events if isinstance(event, TokenEvent)]
    assert tokens == [(row, token, 0.25) for row in range(3) for token in IDS]
    ends = [event for event in events if isinstance(event, RowFinished)]
    assert [(end.row, end.reason) for end in ends] == [(row, FinishReason.MAX_TOKENS) for row in range(3)]
    (receipt,) = ends[1].receipts
    assert (receipt.prompt_tokens_steered, receipt.generated_tokens_steered) == (len(PROMPT), len(IDS) - 1)
    assert [len(settings) for _, _, settings, _, _ in engine.streams] == [0, 1]
    for _, read, _, keep, alone in engine.streams:
        assert (read, keep, alone) == ((*PROMPT, *IDS[:-1]), len(PROMPT) - 1, True)
    # Read, and not generated.
    assert (job._context.work.prompt_tokens, job._context.work.steered_tokens) == (len(PROMPT) + len(IDS) - 1, 0)
    await over(engine, job)
    assert (job.running, job.waiting) == (0, 0)
    await settled(engine)


@pytest.mark.parametrize("where", ["load", "read", "score"])
async def test_a_given_text_is_scored_within_its_time_or_not_at_all(engine, start, scored, where):
    engine.gates[where] = asyncio.Event()
    events = await events_of(start(Row(score=True), scored, text=IDS, time_limit=0.1))
    ends = [event for event in events if isinstance(event, RowFinished)]
    assert [end.reason for end in ends] == [FinishReason.TIME_LIMIT] * 2
    assert not [event for event in events if isinstance(event, TokenEvent)]
    await settled(engine)


@pytest.mark.parametrize("where", ["load", "read", "score", "take"])
@pytest.mark.parametrize("end", ["cancel", "stop"])
async def test_a_given_text_that_is_given_up_leaves_nothing_behind(engine, start, scored, where, end):
    gate = engine.gates[where] = asyncio.Event()
    job = start(Row(score=True), scored, text=IDS)
    await asyncio.sleep(0.02)
    getattr(job, end)()
    if end == "stop":
        with pytest.raises(ShuttingDownError):
            await events_of(job)
    await over(engine, job)
    gate.set()
    assert (job.running, job.waiting) == (0, 0)
    await settled(engine)


async def test_a_given_text_that_was_not_steered_is_an_error(engine, start, scored):
    engine.count = 3
    with pytest.raises(SteeringNotAppliedError, match="0 of 3 generated tokens were steered"):
        await events_of(start(Row(score=True), scored, text=IDS))
    await settled(engine)
