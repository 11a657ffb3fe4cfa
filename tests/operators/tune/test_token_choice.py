"""Tokens are chosen as transformers chooses them, whatever else is in the batch."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from operators.core.measured import Sampling
from operators.tune.continuations import ContinuationRequest, decode_continuations
from operators.tune.token_choice import TokenChoice

CPU = torch.device("cpu")


def test_the_penalty_is_that_of_transformers():
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    prompts = [(1, 2), (3,), (4, 5, 6)]
    choice = TokenChoice(Sampling(repetition_penalty=1.7), prompts, CPU)
    texts = [list(prompt) for prompt in prompts]
    for _ in range(4):
        chosen = choice.choose(logits)
        for row, text in enumerate(texts):
            scores = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([text]), logits[row : row + 1].clone())
            assert int(chosen[row]) == int(scores.argmax())
            text.append(int(chosen[row]))


def test_greedy_texts_with_a_penalty_are_those_of_generate(tiny):
    loaded = tiny("llama", dtype="float32")
    ids = [tuple(loaded.tokenizer(text)["input_ids"]) for text in ("The bay", "Here is a painting of the", "My dress")]
    texts = decode_continuations(
        [ContinuationRequest(each) for each in ids], loaded, tokens=8, sampling=Sampling(repetition_penalty=1.3)
    )
    for prompt, text in zip(ids, texts, strict=True):
        whole = loaded.model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, repetition_penalty=1.3, pad_token_id=0
        )
        assert list(text.ids) == whole[0, len(prompt) :].tolist()


def test_drawn_texts_are_the_same_in_any_batch_and_follow_the_seed(tiny):
    loaded = tiny("llama", dtype="float32")
    ids = [tuple(loaded.tokenizer(text)["input_ids"]) for text in ("The bay", "My dress")]
    sampling = Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.0)

    def texts(rows, how):
        found = decode_continuations([ContinuationRequest(each) for each in rows], loaded, tokens=8, sampling=how)
        return [text.ids for text in found]

    together = texts(ids, sampling)
    assert together == [texts([each], sampling)[0] for each in ids]
    assert together != texts(ids, sampling.model_copy(update={"seed": 1}))


@pytest.mark.parametrize("top_p", [0.3, 0.6, 1.0])
def test_only_the_likeliest_tokens_up_to_top_p_are_drawn(top_p):
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(400, 4)
    choice = TokenChoice(
        Sampling(temperature=1.0, top_p=top_p, repetition_penalty=1.0), [(row,) for row in range(400)], CPU
    )
    drawn = set(choice.choose(logits).tolist())
    assert drawn == {0.3: {0}, 0.6: {0}, 1.0: {0, 1, 2, 3}}[top_p]
