"""The embedded engine's front: prompts on their way to ids, and models that it cannot serve."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest
from transformers import BertConfig, BertLMHeadModel

from operators.model.loading import recognise
from steer_server.engine.hf.engine import HFEngine
from steer_server.errors import PromptTooLongError, QueueFullError, ShuttingDownError, StartupError
from steer_server.types import ChatMessage, DecodeJob, Prompt, Row, SamplingParams


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
    began = time.monotonic()
    with pytest.raises(PromptTooLongError):
        await engine.encode(Prompt(text=text))
    assert time.monotonic() - began < 1


async def test_a_chat_that_cannot_fit_is_refused_without_being_read(llama, monkeypatch):
    monkeypatch.setattr(llama.tokenizer, "chat_template", "{{ messages[0].content }}")
    engine = HFEngine(llama, max_queue=2)
    began = time.monotonic()
    try:
        with pytest.raises(PromptTooLongError):
            await engine.encode(Prompt(chat=(ChatMessage("user", "the bay " * (14 << 17)),)))
    finally:
        await engine.close()
    assert time.monotonic() - began < 2


async def test_a_text_just_within_the_context_is_read_whatever_its_letters(engine, llama):
    longest = max(llama.tokenizer.get_vocab(), key=len).replace("Ġ", " ")
    size = len(llama.tokenizer(longest)["input_ids"])
    ids = await engine.encode(Prompt(text=longest * ((llama.context_length - 1) // size)))
    assert len(ids) == (llama.context_length - 1) // size * size


@pytest.fixture
def slow(engine, monkeypatch):
    """Encoding waits until it is let go; the threads that did it are noted."""
    gate, names = threading.Event(), []

    def encode(prompt):
        names.append(threading.current_thread().name)
        gate.wait(10)
        return (1,)

    monkeypatch.setattr(engine._prompts, "_encode", encode)
    yield gate, names
    gate.set()


async def test_prompts_are_read_one_at_a_time_in_a_thread_of_their_own(engine, slow):
    gate, names = slow
    tasks = [asyncio.ensure_future(engine.encode(Prompt(text="x"))) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert len(names) == 1
    gate.set()
    assert await asyncio.gather(*tasks) == [(1,)] * 3
    assert len(names) == 3
    assert len(set(names)) == 1
    assert names[0].startswith("encode")


async def test_no_more_than_four_times_as_many_prompts_wait_as_jobs_may(engine, slow):
    gate, _ = slow
    tasks = [asyncio.ensure_future(engine.encode(Prompt(text="x"))) for _ in range(8)]
    await asyncio.sleep(0.05)
    with pytest.raises(QueueFullError) as caught:
        await engine.encode(Prompt(text="x"))
    assert caught.value.retry_after > 0
    gate.set()
    await asyncio.gather(*tasks)
    assert await engine.encode(Prompt(text="x")) == (1,)


async def test_a_prompt_that_is_given_up_frees_its_place(engine, slow):
    gate, _ = slow
    tasks = [asyncio.ensure_future(engine.encode(Prompt(text="x"))) for _ in range(8)]
    await asyncio.sleep(0.05)
    tasks[7].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[7]
    tasks[7] = asyncio.ensure_future(engine.encode(Prompt(text="x")))
    await asyncio.sleep(0.05)
    gate.set()
    assert await asyncio.gather(*tasks) == [(1,)] * 8


async def test_prompts_that_wait_when_the_engine_closes_are_told_so(engine, slow):
    gate, _ = slow
    tasks = [asyncio.ensure_future(engine.encode(Prompt(text="x"))) for _ in range(3)]
    await asyncio.sleep(0.05)
    await engine.close()
    gate.set()
    first, *others = await asyncio.gather(*tasks, return_exceptions=True)
    assert first == (1,)
    assert [type(other) for other in others] == [ShuttingDownError] * 2
    with pytest.raises(ShuttingDownError):
        await engine.encode(Prompt(text="x"))


@pytest.mark.parametrize(("room", "kept"), [(None, 1), (1, 0)])
async def test_operators_are_kept_between_jobs_within_the_memory_for_them(llama, artifact, plan_of, room, kept):
    engine = HFEngine(llama, max_queue=2, **({} if room is None else {"operator_memory": room}))
    async for _ in engine.submit(DecodeJob((1, 2), SamplingParams(max_tokens=2), (Row(plan_of((artifact, 0.5))),))):
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
