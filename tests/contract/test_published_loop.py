"""The engine against the published procedure, written again from its equations and as slowly as they read."""

from __future__ import annotations

from itertools import product

import pytest

from steer_server.types import SamplingParams

pytestmark = pytest.mark.model

CONCEPTS = (
    "The Golden Gate Bridge in San",
    "The capital of France is",
    "The wedding was beautiful and the bride",
)
LAYERS = (15, 21, 24)
STRENGTHS = (0.25, 0.55, -0.4)
PROMPTS = ("Here is a painting of the", "I went to new york to see the", "My")
TOKENS = 12
CASES = [("hf", concept, layer) for concept, layer in product(CONCEPTS, LAYERS)]
# Fewer on vLLM, whose texts test_vllm_parity.py compares with those of the hf engine, more and longer ones.
CASES += [
    pytest.param("vllm", concept, layer, marks=pytest.mark.vllm)
    for concept, layer in zip(CONCEPTS, reversed(LAYERS), strict=True)
]


@pytest.mark.parametrize(("engine", "concept", "layer"), CASES, indirect=["engine"])
async def test_cached_decoding_gives_the_ids_of_the_published_recompute_everything_loop(
    concept, layer, smollm, engine, operator_of, decode, steered_row, recompute
):
    # As published, and as built by default.
    rank = "full" if CONCEPTS.index(concept) == LAYERS.index(layer) else 64
    loaded, artifact = smollm(), operator_of(concept, "golden", layer, rank)
    sampling = SamplingParams(max_tokens=TOKENS)
    for prompt in PROMPTS:
        rows = [steered_row(artifact, strength) for strength in STRENGTHS]
        prompt_ids = loaded.tokenizer(prompt)["input_ids"]
        found = await decode(engine, prompt, sampling, *rows)
        expected = recompute(loaded.model, artifact, prompt_ids, STRENGTHS, TOKENS)
        assert [ids for ids, _ in found] == expected, prompt
        for strength, (ids, end) in zip(STRENGTHS, found, strict=True):
            receipt = end.receipts[0]
            assert receipt.prompt_tokens_steered == len(prompt_ids)
            assert receipt.generated_tokens_steered == len(ids) - 1
            assert receipt.mean_dose == pytest.approx(abs(strength) / 2, rel=1e-4)
