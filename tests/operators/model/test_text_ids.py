import copy

import pytest
from tokenizers import processors

from operators.builder.concept import concept_from_text
from operators.builder.neutral import tokenise_neutral
from operators.model.text_ids import text_ids


@pytest.fixture
def appending(tiny_tokenizer):
    """``appending(template)``: the tiny tokenizer with special tokens around each text."""

    def make(template):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        special = [("<end>", 0)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
        return tokenizer

    return make


@pytest.mark.parametrize("text", ["The bay", "\n\n", "", "the end <end>", "<end>", "<end><end>"])
@pytest.mark.parametrize("behind", ["", " <end>", " <end> <end>"])
@pytest.mark.parametrize("front", ["", "<end> ", "<end> <end> "])
def test_what_a_tokenizer_puts_in_front_stays_and_what_it_puts_behind_goes(appending, front, behind, text):
    tokenizer = appending(f"{front}$A{behind}")
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert text_ids(tokenizer, text) == (*[0] * front.count("<end>"), *own)


def test_a_concept_and_the_neutral_texts_end_in_a_word(appending, tiny):
    loaded = tiny("llama", fresh=True)
    plain = concept_from_text("The bay", loaded).ids
    object.__setattr__(loaded, "tokenizer", appending("<end> $A <end>"))
    assert concept_from_text("The bay", loaded).ids == (0, *plain)
    assert all(ids[0] == 0 and ids[-1] != 0 for ids in tokenise_neutral(loaded, ["The bay", "a bridge"]).ids)
