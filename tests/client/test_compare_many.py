"""Several texts and several prompts in one request: what is sent, what comes of it, and answers that are none."""

import pytest
from steer_client import (
    ArmDelta,
    AsyncSteerClient,
    InvalidRequestError,
    OperatorUse,
    PromptResult,
    ProtocolError,
    SamplingParams,
    SteeringNotAppliedError,
)
from steering.v1 import comparison_pb2, text_pb2

ARMS = {"a": "golden-gate=0.4", "b": {"tea": 0.2}}


def test_samples_are_asked_for_and_come_in_order(client, fake, make):
    fake.response = make.response(operators=[make.sent(OperatorUse("tea", 0.2))])
    found = client.samples("hello", 3, operators="tea=0.2", sampling=SamplingParams(seed=7))
    (sent,) = fake.requests
    assert sent.n == 3
    assert [(each.sample, each.seed) for each in found] == [(0, 7), (1, 8), (2, 9)]


async def test_samples_of_the_asyncio_client(async_client, fake):
    assert len(await async_client.samples("hello", 2)) == 2
    assert len(await async_client.samples("hello", 1)) == 1
    assert [sent.HasField("n") for sent in fake.requests] == [True, False]


def test_a_sample_too_few_or_without_its_receipt_is_refused(client, fake, make):
    fake.response = make.response(more=[make.response(sample=1)])
    with pytest.raises(ProtocolError, match=r"samples \[0, 1\]; asked for were 1"):
        client.samples("hello", 1)
    fake.response = make.response(operators=("tea",))
    fake.response.more.add().CopyFrom(make.response(sample=1))
    fake.text = lambda request: fake.response
    with pytest.raises(ProtocolError, match="asked for were 3"):
        client.samples("hello", 3, operators="tea")


@pytest.mark.parametrize(
    ("prompts", "ids"),
    [({"x": "one", "y": [1, 2]}, ["x", "y"]), (["one", "two", "three"], ["0", "1", "2"]), (iter(["one"]), ["0"])],
    ids=["mapping", "list", "iterator"],
)
def test_several_prompts_are_one_request_with_a_result_for_each(client, fake, prompts, ids):
    results = client.compare_many(prompts, arms=ARMS, n=2)
    (sent,) = fake.requests
    assert [prompt.id for prompt in sent.prompts] == ids
    assert (sent.HasField("prompt"), sent.n, sent.repeat_in_finished) == (False, 2, False)
    assert list(results) == ids
    for result in results.values():
        assert result.normal.text == "one two"
        assert (result.normal.token_ids, list(result.steered)) == ((11, 12, 13), ["a", "b"])
        assert [each.steered["b"].generation.seed for each in result.samples] == [7, 8]
        assert result.steered["a"].kl.mean == 0.5


def test_a_stream_of_several_prompts_gives_each_result_when_it_is_there(client):
    stream = client.compare_many_stream({"x": "one", "y": "two", "z": "three"}, arms=ARMS, normal=False)
    pieces = list(stream)
    assert [piece.prompt_id for piece in pieces if isinstance(piece, PromptResult)] == ["z", "y", "x"]
    deltas = [piece for piece in pieces if isinstance(piece, ArmDelta) and piece.prompt_id == "y" and piece.arm == "a"]
    assert "".join(delta.delta.text for delta in deltas) == "one more"
    assert list(stream.result) == ["x", "y", "z"]
    assert all(result.plain is None for result in stream.result.values())
    done = {piece.prompt_id: piece.result for piece in pieces if isinstance(piece, PromptResult)}
    assert done == stream.result


async def test_a_stream_of_several_prompts_of_the_asyncio_client(fake):
    async with AsyncSteerClient(fake.target, timeout=20) as client:
        async with client.compare_many_stream(["one", "two"], arms=ARMS) as stream:
            results = [piece async for piece in stream if isinstance(piece, PromptResult)]
        assert len(results) == 2
        assert list(await client.compare_many(["one"], operators="tea")) == ["0"]


@pytest.mark.parametrize(
    ("prompts", "field"),
    [
        ([], "prompts"),
        ({}, "prompts"),
        ("one", "prompts"),
        (["one", 5], "prompts[1].prompt"),
        ({3: "x"}, "prompts[0].id"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_sent_are_named(client, fake, prompts, field):
    with pytest.raises(InvalidRequestError) as caught:
        client.compare_many(prompts, arms=ARMS)
    assert caught.value.field == field
    assert str(caught.value).startswith(field)
    assert fake.requests == []


def _of(make, *ids, arms=("a",), n=1):
    texts = {name: make.response("one more", operators=["tea"]) for name in arms}
    return make.comparisons(list(ids), make.comparison(make.response(), texts, n=n))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda events: events[:-1], "ended without `compared` of the prompt 'x'"),
        (lambda events: [*events, events[-1]], "events of the prompt 'x' after its `compared`"),
        (lambda events: [_renamed(events[0])], "of the prompt 'other', which was not asked for"),
        (lambda events: [event for event in events if not event.HasField("delta")], "has 3 tokens; it streamed 0"),
        (lambda events: [_repeating(event) for event in events], "was asked not to repeat"),
    ],
    ids=["no end", "after the end", "another prompt", "no deltas", "repeated"],
)
def test_an_answer_that_does_not_fit_the_prompts_is_refused(client, fake, make, change, problem):
    fake.events = change(_of(make, "x", "y"))
    with pytest.raises(ProtocolError, match=problem):
        client.compare_many({"x": "one", "y": "two"}, arms={"a": "tea"})


def _renamed(event):
    other = comparison_pb2.CompareEvent()
    other.CopyFrom(event)
    other.prompt_id = "other"
    return other


def _repeating(event):
    other = comparison_pb2.CompareEvent()
    other.CopyFrom(event)
    if other.HasField("finished"):
        other.finished.text = "one two"
    return other


def test_a_text_of_several_prompts_without_its_receipts_is_refused(client, fake, make):
    fake.events = _of(make, "x")
    for event in fake.events:
        if event.arm == "a" and event.HasField("finished"):
            del event.finished.receipts[:]
    with pytest.raises(SteeringNotAppliedError):
        client.compare_many({"x": "one"}, arms={"a": "tea"})


def test_logprobs_that_were_streamed_are_those_of_the_result(client, fake, make):
    fake.events = _of(make, "x", arms=())
    for event in fake.events:
        if event.HasField("delta"):
            event.delta.logprobs.extend(text_pb2.TokenLogprob(token_id=token) for token in event.delta.token_ids)
    result = client.compare_many({"x": "one"}, arms={})["x"]
    assert [each.token_id for each in result.normal.logprobs] == [11, 12, 13]
