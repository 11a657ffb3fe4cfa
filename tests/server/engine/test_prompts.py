import copy

import pytest
from tokenizers import processors

from steer_server.engine.describe import describe_model
from steer_server.engine.prompts import PromptReader
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
