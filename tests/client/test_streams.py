import asyncio
import contextlib
import gc
from types import SimpleNamespace

import grpc
import pytest
from steer_client import (
    ArmDelta,
    EngineFailedError,
    GenerationStream,
    OperatorUse,
    ProtocolError,
    RequestCancelledError,
    TextDelta,
)
from steering.v1 import comparison_pb2, text_pb2
from steering.v1 import generation_pb2 as pb


def test_a_stream_gives_its_pieces_then_its_result(client, fake):
    stream = client.stream("hello")
    assert list(stream) == [TextDelta("one", (11,)), TextDelta(" two", (12, 13))]
    assert stream.result.text == "one two"
    assert stream.prompt_token_ids == (1, 2, 3)


async def test_an_async_stream_gives_its_pieces_then_its_result(async_client, fake):
    stream = async_client.stream("hello")
    assert [delta async for delta in stream] == [TextDelta("one", (11,)), TextDelta(" two", (12, 13))]
    assert stream.result.text == "one two"
    assert stream.prompt_token_ids == (1, 2, 3)


def test_a_streams_logprobs_come_with_their_tokens(client, fake, make):
    fake.response = make.response("a ")
    fake.events = make.events(fake.response)
    fake.events[1].delta.logprobs.add(token_id=11, token="a", logprob=-0.5).top.add(token_id=4, logprob=-1)
    first = next(iter(client.stream("hello")))
    assert first.logprobs[0].token == "a"
    assert first.logprobs[0].top[0].token_id == 4


def test_a_comparison_streams_every_arm_by_name(client):
    stream = client.compare_stream("hello", operators=[OperatorUse("golden-gate")])
    pieces = list(stream)
    assert pieces[0] == ArmDelta("normal", TextDelta("one", (11,)))
    assert {piece.arm for piece in pieces} == {"normal", "steered"}
    result = stream.result
    assert result.normal.text == "one two"
    assert result.normal.receipts == ()
    arm = result.steered["steered"]
    assert arm.generation.text == "one more"
    assert arm.generation.receipts[0].operator == "golden-gate"
    assert (arm.first_divergence, arm.kl.mean, arm.kl.p95) == (1, 0.5, 0.75)
    assert (arm.normal_perplexity, arm.steered_perplexity) == (3, 9)


async def test_a_comparison_streams_every_arm_by_name_async(async_client):
    arms = {"weak": [OperatorUse("golden-gate", 0.1)], "strong": [OperatorUse("golden-gate", 0.9)]}
    stream = async_client.compare_stream("hello", arms=arms, score=False)
    assert {piece.arm async for piece in stream} == {"normal", "weak", "strong"}
    assert list(stream.result.steered) == ["weak", "strong"]
    assert stream.result.steered["weak"].kl is None


def test_a_result_is_not_there_before_the_end(client):
    stream = client.stream("hello")
    with pytest.raises(RuntimeError, match="read it first"):
        _ = stream.prompt_token_ids
    iterator = iter(stream)
    next(iterator)
    with pytest.raises(RuntimeError, match="read to its end"):
        _ = stream.result
    assert stream.prompt_token_ids == (1, 2, 3)


def test_a_stream_is_read_only_once(client):
    stream = client.stream("hello")
    list(stream)
    with pytest.raises(RuntimeError, match="only once"):
        iter(stream)


def leave_by_break(client):
    stream = client.stream("hello")
    for _ in stream:
        break
    return stream


def leave_by_exception(client):
    stream = client.stream("hello")
    with contextlib.suppress(KeyError):
        for _ in stream:
            raise KeyError
    return stream


def leave_the_with_block(client):
    with client.stream("hello") as stream:
        iterator = iter(stream)
        next(iterator)
    return stream, iterator


def leave_by_cancel(client):
    stream = client.stream("hello")
    iterator = iter(stream)
    next(iterator)
    stream.cancel()
    with pytest.raises(RequestCancelledError):
        next(iterator)
    return stream, iterator


def drop_it_half_read(client):
    iterator = iter(client.stream("hello"))
    next(iterator)
    del iterator
    gc.collect()


def leave_a_comparison(client):
    stream = client.compare_stream("hello", operators=[OperatorUse("golden-gate")])
    for _ in stream:
        break
    return stream


LEAVING = [
    leave_by_break,
    leave_by_exception,
    leave_the_with_block,
    leave_by_cancel,
    drop_it_half_read,
    leave_a_comparison,
]


@pytest.mark.parametrize("leave", LEAVING, ids=lambda leave: leave.__name__)
def test_an_abandoned_stream_is_cancelled_on_the_server(client, fake, leave):
    fake.hang_after = 3
    kept = leave(client)
    assert fake.left.wait(5), "the server was never told"
    del kept


def test_a_stream_that_is_dropped_unread_is_cancelled(client, fake):
    fake.hang_after = 0
    stream = client.stream("hello")
    while not fake.requests:
        pass
    del stream
    gc.collect()
    assert fake.left.wait(5)


def test_closing_the_client_ends_its_streams(client, fake):
    fake.hang_after = 2
    iterator = iter(client.stream("hello"))
    next(iterator)
    client.close()
    with pytest.raises(RequestCancelledError):
        next(iterator)
    assert fake.left.wait(5)
    with pytest.raises(RuntimeError, match="closed"):
        client.stream("hello")


async def aleave_by_break(client):
    stream = client.stream("hello")
    async for _ in stream:
        break
    return stream


async def aleave_by_exception(client):
    stream = client.stream("hello")
    with contextlib.suppress(KeyError):
        async for _ in stream:
            raise KeyError
    return stream


async def aleave_the_with_block(client):
    async with client.stream("hello") as stream:
        iterator = aiter(stream)
        await anext(iterator)
    return stream, iterator


async def aleave_by_cancel(client):
    stream = client.stream("hello")
    iterator = aiter(stream)
    await anext(iterator)
    stream.cancel()
    with pytest.raises(RequestCancelledError):
        await anext(iterator)
    return stream, iterator


async def aleave_by_cancel_while_it_is_read(client):
    stream = client.stream("hello")
    iterator = aiter(stream)
    await anext(iterator)
    await anext(iterator)
    asyncio.get_running_loop().call_later(0.05, stream.cancel)
    with pytest.raises(RequestCancelledError):
        await anext(iterator)
    return stream, iterator


async def aleave_by_cancelling_the_task(client):
    stream = client.stream("hello")
    begun = asyncio.Event()

    async def read():
        async for _ in stream:
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return stream


async def aleave_by_timeout(client):
    stream = client.stream("hello")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None) as limit:
            async for _ in stream:
                # Not before: a call that never reached the server has nobody to tell.
                limit.reschedule(asyncio.get_running_loop().time() + 0.05)
    return stream


async def adrop_it_half_read(client):
    iterator = aiter(client.stream("hello"))
    await anext(iterator)
    del iterator
    gc.collect()


async def aleave_a_comparison(client):
    stream = client.compare_stream("hello", operators=[OperatorUse("golden-gate")])
    async for _ in stream:
        break
    return stream


ASYNC_LEAVING = [
    aleave_by_break,
    aleave_by_exception,
    aleave_the_with_block,
    aleave_by_cancel,
    aleave_by_cancel_while_it_is_read,
    aleave_by_cancelling_the_task,
    aleave_by_timeout,
    adrop_it_half_read,
    aleave_a_comparison,
]


@pytest.mark.parametrize("leave", ASYNC_LEAVING, ids=lambda leave: leave.__name__)
async def test_an_abandoned_async_stream_is_cancelled_on_the_server(async_client, fake, leave):
    fake.hang_after = 3
    kept = await leave(async_client)
    assert await asyncio.to_thread(fake.left.wait, 5), "the server was never told"
    del kept


async def test_a_cancelled_task_cancels_its_unary_call(async_client, fake):
    fake.hang_after = 0
    task = asyncio.create_task(async_client.generate("hello"))
    while not fake.requests:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(fake.left.wait, 5)


async def test_closing_the_async_client_ends_its_calls_with_an_ordinary_error(async_client, fake):
    fake.hang_after = 0
    task = asyncio.create_task(async_client.generate("hello"))
    while not fake.requests:
        await asyncio.sleep(0.01)
    await async_client.close()
    with pytest.raises(RequestCancelledError):
        await task


def started() -> pb.GenerateEvent:
    return pb.GenerateEvent(started=text_pb2.Started(prompt_token_ids=[1]))


def delta(text: str = "one two", token_ids: tuple[int, ...] = (11, 12, 13)) -> pb.GenerateEvent:
    return pb.GenerateEvent(delta=text_pb2.Delta(text=text, token_ids=token_ids))


BROKEN = {
    "no finished": (lambda end: [started(), delta()], "ended without `finished`"),
    "nothing at all": (lambda end: [], "ended without `finished`"),
    "no started": (lambda end: [delta(), end], "out of order at `delta`"),
    "started twice": (lambda end: [started(), started()], "out of order at `started`"),
    "more after finished": (lambda end: [started(), delta(), end, delta()], "out of order at `delta`"),
    "an unknown event": (lambda end: [started(), pb.GenerateEvent()], "update the client"),
    "another text": (lambda end: [started(), delta("else"), end], "differs from the text"),
    "another token": (lambda end: [started(), delta(token_ids=(11, 12, 14)), end], "token ids .* differ from those"),
    "a token withheld": (lambda end: [started(), delta(token_ids=(11, 12)), end], r"\(3\) differ .* \(2\)"),
    "a token too many": (lambda end: [started(), delta(), delta("", (14,)), end], r"\(3\) differ .* \(4\)"),
    "tokens out of order": (lambda end: [started(), delta("one two", (12, 13)), delta("", (11,)), end], "token ids"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_stream_that_breaks_the_contract_is_a_protocol_error(fake, make, streamed, broken):
    events, says = BROKEN[broken]
    fake.events = events(pb.GenerateEvent(finished=make.response()))
    with pytest.raises(ProtocolError, match=says):
        streamed(fake.target)


def test_a_broken_stream_is_cancelled_on_the_server(client, fake):
    fake.events = [started(), pb.GenerateEvent(), delta()]
    fake.hang_after = 2
    stream = client.stream("hello")
    with pytest.raises(ProtocolError):
        list(stream)
    assert fake.left.wait(5)


def changed_token(event: comparison_pb2.CompareEvent) -> comparison_pb2.CompareEvent:
    if event.arm == "steered" and list(event.delta.token_ids) == [11]:
        event.delta.token_ids[0] = 14
    return event


BROKEN_COMPARISONS = {
    "no compared": (lambda events: events[:-1], "ended without `compared`"),
    "an arm unfinished": (lambda events: [*events[:-2], events[-1]], "'steered' ended without `finished`"),
    "more after compared": (lambda events: [*events, events[-1]], "after `compared`"),
    "another token of one arm": (
        lambda events: [changed_token(event) for event in events],
        "token ids of arm 'steered' .* differ",
    ),
    "an unknown arm": (lambda events: [comparison_pb2.CompareEvent(arm="other"), *events], "'other', which was not"),
    "no comparison": (
        lambda events: [*events[:-1], comparison_pb2.CompareEvent(compared=comparison_pb2.CompareFinished())],
        "asked for were",
    ),
}


@pytest.mark.parametrize("broken", BROKEN_COMPARISONS)
def test_a_comparison_that_breaks_the_contract_is_a_protocol_error(fake, make, compare, broken):
    change, says = BROKEN_COMPARISONS[broken]
    steered = make.response("one more", operators=("golden-gate",))
    fake.events = change(make.comparison(make.response(), {"steered": steered}))
    with pytest.raises(ProtocolError, match=says):
        compare(fake.target, operators=[OperatorUse("golden-gate")])


def test_an_error_after_the_text_is_still_an_error(fake, make, streamed):
    fake.fault = make.fault(grpc.StatusCode.INTERNAL, reason="ENGINE_FAILED")
    with pytest.raises(EngineFailedError):
        streamed(fake.target)


def test_a_stream_that_could_not_be_sent_is_dropped_without_a_complaint():
    def send(**_):
        raise ValueError("not sent")

    call = SimpleNamespace(send=send, retries=SimpleNamespace(timeout=None))
    with pytest.raises(ValueError, match="not sent"):
        GenerationStream(call)
    gc.collect()  # an exception in __del__ fails the test
