import asyncio
import copy

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from operators.model.text_ids import following_ids
from steer_server.engine.describe import describe_model
from steer_server.engine.prompts import PromptReader
from steer_server.errors import QueueFullError
from steer_server.types import Prompt


@pytest.mark.parametrize("text", ["The bay", "\n\n"])
async def test_no_prompt_ends_in_what_a_tokenizer_puts_behind_texts(tiny, text):
    loaded = tiny("llama")
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A <end>", special_tokens=[("<end>", 0)]
    )
    reader = PromptReader(tokenizer, describe_model(loaded, engine="hf"), max_waiting=2)
    try:
        own = loaded.tokenizer(text)["input_ids"]
        assert await reader.encode(Prompt(text=text)) == (0, *own)
    finally:
        reader.close()


@pytest.mark.parametrize("text", ["bay", " the bay", "the bay is\n", "\nbay"])
def test_a_text_that_follows_another_has_no_space_of_the_tokenizers_in_front(text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    alphabet = sorted(set("▁\nthebayis"))
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode(fast("bay")["input_ids"]) == " bay"
    assert fast.decode(following_ids(fast, text)) == text


async def test_texts_of_tokens_wait_in_turn_and_within_bounds_as_prompts_do(tiny):
    loaded = tiny("llama")
    reader = PromptReader(loaded.tokenizer, describe_model(loaded, engine="hf"), max_waiting=4)
    try:
        found = await asyncio.gather(*(reader.texts((5, 6, 7)) for _ in range(9)), return_exceptions=True)
        served = [texts for texts in found if not isinstance(texts, QueueFullError)]
        assert served == [tuple(loaded.tokenizer.decode([token]) for token in (5, 6, 7))] * 3, "a quarter is for others"
        assert await reader.texts((5,)) == (loaded.tokenizer.decode([5]),)
    finally:
        reader.close()
