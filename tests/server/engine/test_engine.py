"""The embedded engine's front: prompts on their way to ids, and models that it cannot serve."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest
from transformers import BertConfig, BertLMHeadModel

from operators.model.loading import recognise
from steer_server.caller import CALLER, Caller
from steer_server.engine import prompts
from steer_server.engine.hf.engine import HFEngine
from steer_server.errors import PromptTooLongError, QueueFullError, ShuttingDownError, StartupError
from steer_server.types import Chat, ChatMessage, DecodeJob, Prompt, Row, SamplingParams


@pytest.fixture
async def engine(llama):
    made = HFEngine(llama, max_queue=2)
    yield made
    await made.close()


async def test_a_prompt_is_encoded_as_the_tokenizer_does_it(engine, llama):
    assert list(await engine.encode(Prompt(text="the bay"))) == llama.tokenizer("the bay")["input_ids"]
    assert await engine.encode(Prompt(token_ids=(3, 4))) == (3, 4)


@pytest.mark.parametrize("text", ["x" * (14 << 20), "the bay " * (14 << 17)], ids=["one word", "many words"])
async def test_a_text_that_cannot_fit_is_refused_without_being_read(engine, llama, text):
    began = time.process_time()
    with pytest.raises(PromptTooLongError):
        await engine.encode(Prompt(text=text))
    assert time.process_time() - began < 1


async def test_a_chat_that_cannot_fit_is_refused_without_being_read(llama, monkeypatch):
    monkeypatch.setattr(llama.tokenizer, "chat_template", "{{ messages[0].content }}")
    engine = HFEngine(llama, max_queue=2)
    began = time.process_time()
    try:
        with pytest.raises(PromptTooLongError):
            await engine.encode(Prompt(chat=Chat((ChatMessage("user", "the bay " * (14 << 17)),))))
    finally:
        await engine.close()
    assert time.process_time() - began < 2


async def test_a_text_just_within_the_context_is_read_whatever_its_letters(engine, llama):
    longest = max(llama.tokenizer.get_vocab(), key=len).replace("Ġ", " ")
    size = len(llama.tokenizer(longest)["input_ids"])
    ids = await engine.encode(Prompt(text=longest * ((llama.context_length - 1) // size)))
    assert len(ids) == (llama.context_length - 1) // size * size


async def test_a_text_that_is_too_long_is_read_no_further_than_it_takes_to_know(engine, llama, monkeypatch):
    read = []
    tokenizer = engine._prompts._tokenizer

    def count(text, **options):
        read.extend([len(text)] * (len(text) > 1))  # one letter asks what is put behind a text
        return tokenizer(text, **options)

    monkeypatch.setattr(engine._prompts, "_tokenizer", count)
    text = "qz" * (llama.context_length * 9 // 2)
    assert 8 * llama.context_length < len(text) <= engine._prompts._max_bytes
    with pytest.raises(PromptTooLongError, match=r"has \d+ tokens or more"):
        await engine.encode(Prompt(text=text))
    assert sum(read) <= 8 * llama.context_length
    read.clear()
    fits = "the golden bridge " * 8
    assert len(await engine.encode(Prompt(text=fits))) < llama.context_length
    assert read == [len(fits)]


@pytest.fixture
def slow(engine, monkeypatch):
    """Reading waits until it is let go; the threads that did it are noted, by text."""
    gate, names = threading.Event(), {}

    def read(text, **_options):
        names[text] = threading.current_thread().name
        gate.wait(10)
        return (1,)

    monkeypatch.setattr(engine._prompts, "_read", read)
    yield gate, names
    gate.set()


async def test_a_short_prompt_is_read_beside_a_long_one(engine, slow, monkeypatch):
    monkeypatch.setattr(prompts, "_SHORT", 10)
    gate, names = slow
    tasks = [asyncio.ensure_future(engine.encode(Prompt(text=text * 20))) for text in "abcd"]
    tasks.append(asyncio.ensure_future(engine.encode(Prompt(text="x"))))
    async with asyncio.timeout(10):
        while len(names) < 2:
            await asyncio.sleep(0.005)
    assert names["x"].startswith("encode-short")
    # The long ones have one thread, which is held.
    assert [name for text, name in names.items() if text != "x"] == ["encode-long_0"]
    gate.set()
    assert await asyncio.gather(*tasks) == [(1,)] * 5


def ask(engine, caller, text="x"):
    async def encode():
        CALLER.set(Caller(caller))
        return await engine.encode(Prompt(text=text))

    return asyncio.ensure_future(encode())


async def test_no_more_than_four_times_as_many_prompts_wait_as_jobs_may(engine, slow):
    gate, _ = slow
    tasks = [ask(engine, caller) for caller in "ababab" + "cd"]
    await asyncio.sleep(0.05)
    with pytest.raises(QueueFullError, match="8 prompts wait to be read; at most 8") as caught:
        await engine.encode(Prompt(text="x"))
    assert caught.value.retry_after > 0
    gate.set()
    await asyncio.gather(*tasks)
    assert await engine.encode(Prompt(text="x")) == (1,)


async def test_one_caller_leaves_room_for_others(engine, slow):
    gate, _ = slow
    tasks = [ask(engine, "a") for _ in range(6)]
    await asyncio.sleep(0.05)
    with pytest.raises(QueueFullError, match="6 of one caller"):
        await ask(engine, "a")
    tasks.append(ask(engine, "b"))
    await asyncio.sleep(0.05)
    gate.set()
    assert await asyncio.gather(*tasks) == [(1,)] * 7
    assert not engine._prompts._room._taken


async def test_a_prompt_that_is_given_up_frees_its_place(engine, slow):
    gate, _ = slow
    tasks = [ask(engine, "a") for _ in range(6)]
    await asyncio.sleep(0.05)
    tasks[5].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[5]
    tasks[5] = ask(engine, "a")
    await asyncio.sleep(0.05)
    gate.set()
    assert await asyncio.gather(*tasks) == [(1,)] * 6


async def test_prompts_that_wait_when_the_engine_closes_are_told_so(engine, slow):
    gate, _ = slow
    tasks = [asyncio.ensure_future(engine.encode(Prompt(text="x"))) for _ in range(3)]
    await asyncio.sleep(0.05)
    await engine.close()
    gate.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    # Two threads had begun.
    assert found[:2] == [(1,)] * 2
    assert type(found[2]) is ShuttingDownError
    with pytest.raises(ShuttingDownError):
        await engine.encode(Prompt(text="x"))


@pytest.mark.parametrize(("room", "kept"), [(None, 1), (1, 0)])
async def test_operators_are_kept_between_jobs_within_the_memory_for_them(llama, artifact, plan_of, room, kept):
    engine = HFEngine(llama, max_queue=2, **({} if room is None else {"operator_memory": room}))
    async for _ in engine.submit(DecodeJob.of((1, 2), SamplingParams(max_tokens=2), (Row(plan_of((artifact, 0.5))),))):
        pass
    await engine.close()
    assert len(engine._operators) == kept


def test_a_model_without_decoder_layers_cannot_be_served(tiny_tokenizer):
    config = BertConfig(
        vocab_size=320,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        is_decoder=True,
        attn_implementation="eager",
    )
    with pytest.raises(StartupError, match=r"BertLMHeadModel.* cannot be served: .*none of layers, h"):
        HFEngine(recognise("gpt-tiny", BertLMHeadModel(config), tiny_tokenizer), max_queue=1)


def test_a_model_whose_tokenizer_has_no_fast_form_cannot_be_served(llama):
    class Slow:
        eos_token_id = 0

        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(StartupError, match="tiny-llama: its tokenizer Slow has no fast form"):
        HFEngine(replace(llama, tokenizer=Slow()), max_queue=1)
