"""The engine against the published procedure, written again from its equations and as slowly as they read."""

from __future__ import annotations

import pytest
import torch

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


def published_loop(model, artifact, prompt_ids, strength, tokens):
    """Recompute everything for every token: one row, no KV cache, no shared code with the engine.

    Position k of the input of block s-1 gets (strength/2) |h_k| a_k/|a_k| with a_k = sum_{j<=k} J_{j mod n} x_j.
    """
    blocks = artifact.jacobian
    table = model.get_input_embeddings().weight
    site = model.model.layers[artifact.header.layer - 1]
    ids = list(prompt_ids)

    def add(_module, args):
        hidden = args[0].clone()
        total = torch.zeros(hidden.shape[-1])
        for k, token in enumerate(ids):
            total = total + blocks[k % len(blocks)] @ table[token]
            h = hidden[0, k]
            hidden[0, k] = h + (strength / 2) * h.norm() * total / total.norm()
        return (hidden, *args[1:])

    for _ in range(tokens):
        handle = site.register_forward_pre_hook(add)
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        handle.remove()
        ids.append(int(logits.argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids[len(prompt_ids) :]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("concept", CONCEPTS)
async def test_cached_decoding_gives_the_ids_of_the_published_recompute_everything_loop(
    concept, layer, smollm, engine, operator_of, decode, steered_row
):
    loaded, artifact = smollm(), operator_of(concept, "golden", layer)
    sampling = SamplingParams(max_tokens=TOKENS)
    for strength in STRENGTHS:
        for prompt in PROMPTS:
            [(ids, end)] = await decode(engine, prompt, sampling, steered_row(artifact, strength))
            prompt_ids = loaded.tokenizer(prompt)["input_ids"]
            assert ids == published_loop(loaded.model, artifact, prompt_ids, strength, TOKENS), (strength, prompt)
            receipt = end.receipts[0]
            assert receipt.prompt_tokens_steered == len(prompt_ids)
            assert receipt.generated_tokens_steered == len(ids) - 1
            assert receipt.mean_dose == pytest.approx(abs(strength) / 2, rel=1e-4)
