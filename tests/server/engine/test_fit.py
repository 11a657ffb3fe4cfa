"""A text whose length a request leaves to the server is as long as there is room for, and is never refused for it."""

from types import SimpleNamespace

import pytest
from steering.v1 import comparison_pb2, text_pb2
from steering.v1 import generation_pb2 as pb

from steer_server.caps import Caps
from steer_server.compare import compare
from steer_server.engine.fit import fitted
from steer_server.engine.hf.engine import HFEngine
from steer_server.engine.hf.memory import DecodeMemory
from steer_server.errors import InvalidRequestError
from steer_server.generate import generate
from steer_server.rpc import codec
from steer_server.types import ArmEvent, Completion, DecodeJob, FinishReason, Row, SamplingParams

_PROMPT = text_pb2.Prompt(token_ids=text_pb2.TokenIds(ids=[3, 4, 5, 6]))
_ROOM = 50


def _row(tokens, **fields):
    return Row(sampling=SamplingParams(max_tokens=tokens, seed=1, **fields))


def _fits(tokens, **fields):
    return _row(tokens, fit_max_tokens=True, **fields)


def _room(tokens):
    def check(job):
        if sum(row.sampling.max_tokens for row in job.rows) > tokens:
            raise InvalidRequestError("sampling.max_tokens", "too many")

    return check


def _lengths(job):
    return [row.sampling.max_tokens for row in job.rows]


@pytest.mark.parametrize("room", [1, 2, 3, 7, 63, 64, 65, 99])
def test_a_text_that_may_be_shorter_is_as_long_as_is_accepted(room):
    assert _lengths(fitted(DecodeJob((1,), (_fits(100),)), _room(room))) == [room]


def test_rows_of_a_length_that_was_chosen_keep_it():
    job = DecodeJob((1,), (_row(30), _fits(100), _fits(10)))
    assert _lengths(fitted(job, _room(60))) == [30, 20, 10]
    assert fitted(job, _room(140)) is job
    with pytest.raises(InvalidRequestError):
        fitted(job, _room(31))
    chosen = DecodeJob((1,), (_row(100),))
    assert fitted(chosen, _room(1)) is chosen


def test_no_text_is_shorter_than_its_least():
    assert _lengths(fitted(DecodeJob((1,), (_fits(100, min_tokens=40),)), _room(41))) == [41]
    with pytest.raises(InvalidRequestError):
        fitted(DecodeJob((1,), (_fits(100, min_tokens=40),)), _room(39))


def test_texts_share_what_the_caps_leave():
    rows = (_row(30), _fits(100), _fits(10))
    for caps, lengths in (
        (Caps(), [30, 100, 10]),
        (Caps(max_tokens=50), [30, 50, 10]),
        (Caps(max_total_tokens=2 * 90), [30, 30, 10]),
        (Caps(max_tokens=20, max_total_tokens=2 * 90), [30, 20, 10]),
        (Caps(max_total_tokens=3), [30, 1, 1]),
    ):
        assert [row.sampling.max_tokens for row in caps.fit(rows, num_prompts=2)] == lengths


@pytest.fixture
async def small(llama):
    """An engine that has memory for so many tokens of one row."""
    memory = DecodeMemory.of(llama, None)
    engine = HFEngine(llama, max_queue=2, decode_memory=memory.per_row + _ROOM * memory.per_token)
    yield engine
    await engine.close()


@pytest.fixture
def registry():
    async def plan_beside(groups):
        return [None for _ in groups]

    return SimpleNamespace(plan_beside=plan_beside)


async def _text(engine, registry, sampling):
    asked = codec.generation_request(pb.GenerateRequest(prompt=_PROMPT, sampling=sampling))
    events = [event async for event in generate(engine, registry, asked)]
    assert isinstance(events[-1], Completion)
    return events[-1]


async def test_a_text_of_no_given_length_ends_where_memory_does(small, registry):
    given = text_pb2.SamplingParams(ignore_eos=True)
    whole = await _text(small, registry, given)
    assert whole.finish_reason is FinishReason.MAX_TOKENS
    assert len(whole.token_ids) == _ROOM - 4
    one_more = text_pb2.SamplingParams(max_tokens=len(whole.token_ids) + 1)
    with pytest.raises(InvalidRequestError, match=f"enough for {len(whole.token_ids)} tokens"):
        await _text(small, registry, one_more)
    asked = codec.compare_request(
        comparison_pb2.CompareRequest(
            prompt=_PROMPT,
            sampling=given,
            arms=[comparison_pb2.Arm(name="long", sampling=given)],
            score=False,
        )
    )
    texts = [
        event.event
        async for event in compare(small, registry, asked, max_arms=3)
        if isinstance(event, ArmEvent) and isinstance(event.event, Completion)
    ]
    assert [text.finish_reason for text in texts] == [FinishReason.MAX_TOKENS] * 2


@pytest.mark.parametrize(("prompt", "rows", "length"), [(10, 1, 990), (10, 2, 490), (900, 1, 128), (3950, 1, 50)])
def test_a_long_text_of_no_given_length_leaves_room_for_others(prompt, rows, length):
    memory = DecodeMemory(budget=4000, per_token=1, per_row=0, context_length=10**6)
    job = DecodeJob((1,) * prompt, (_fits(10**6),) * rows)
    assert _lengths(fitted(job, memory.needed)) == [length] * rows
    memory.needed(fitted(job, memory.needed))
    # One that is asked for may have all of it.
    memory.needed(DecodeJob((1,) * prompt, (_row((4000 - rows * prompt) // rows),) * rows))
