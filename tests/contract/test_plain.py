"""Without steering the engine is transformers, token for token."""

from __future__ import annotations

import functools

import pytest
import torch

from steer_server.types import FinishReason, Row, SamplingParams

pytestmark = pytest.mark.model

PROMPTS = (
    "Here is a painting of the",
    "I went to new york to see the",
    "def fibonacci(n):",
    "The three most important things in life are",
    "Q: What is the capital of Italy?\nA:",
    "x",
)
TOKENS = 24


@functools.cache
def generate(loaded, prompt, **options):
    """Every engine is held against the same answer."""
    ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
    found = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, **options)
    return found[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
async def test_plain_rows_and_rows_of_strength_0_give_the_ids_of_transformers_generate(
    prompt, smollm, engine, operator_of, decode, steered_row
):
    operator = operator_of("The Golden Gate Bridge in San", "golden", 21)
    expected = generate(smollm(), prompt, do_sample=False)
    sampling = SamplingParams(max_tokens=TOKENS)
    [(plain, end)] = await decode(engine, prompt, sampling, Row())
    [(silent, silent_end)] = await decode(engine, prompt, sampling, steered_row(operator, 0.0))
    assert plain == silent == expected
    assert end.receipts == ()
    assert silent_end.receipts[0].prompt_tokens_steered == 0
    assert silent_end.receipts[0].max_dose == 0.0


async def test_the_repetition_penalty_is_that_of_transformers(smollm, engine, decode):
    prompt = "I like it. I like it. I like"
    expected = generate(smollm(), prompt, do_sample=False, repetition_penalty=1.3)
    [(ids, _)] = await decode(engine, prompt, SamplingParams(max_tokens=TOKENS, repetition_penalty=1.3), Row())
    assert ids == expected


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=TOKENS),
        SamplingParams(max_tokens=TOKENS, temperature=0.9, top_p=0.9, top_k=50, min_p=0.02, seed=7),
    ],
    ids=["greedy", "sampled"],
)
async def test_the_normal_arm_of_a_comparison_is_the_plain_row_alone(
    sampling, engine, operator_of, decode, steered_row
):
    operator = operator_of("The Golden Gate Bridge in San", "golden", 21)
    for prompt in PROMPTS[:2]:
        [(alone, _)] = await decode(engine, prompt, sampling, Row())
        steered = steered_row(operator, 0.55)
        arms = await decode(engine, prompt, sampling, Row(score=True), Row(steered.plan, score=True))
        [(steered_alone, _)] = await decode(engine, prompt, sampling, steered)
        assert arms[0][0] == alone
        assert arms[1][0] == steered_alone


async def test_eos_ends_a_row_and_is_among_its_ids_unless_it_is_ignored(smollm, engine, decode):
    prompt = "Here is a painting of the"
    [(ids, end)] = await decode(engine, prompt, SamplingParams(max_tokens=64), Row())
    assert end.reason is FinishReason.EOS
    assert ids[-1] == smollm().model.config.eos_token_id
    [(longer, end)] = await decode(engine, prompt, SamplingParams(max_tokens=20, ignore_eos=True), Row())
    assert end.reason is FinishReason.MAX_TOKENS
    assert len(longer) == 20
    assert longer[: len(ids)] == ids


async def test_the_model_is_described_with_what_computes_its_attention(engine):
    of_vllm = "FLASH_ATTN" if torch.cuda.is_available() else "CPU_ATTN"
    assert engine.model.attention == {"hf": "sdpa", "vllm": of_vllm}[engine.model.engine]
