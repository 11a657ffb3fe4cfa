"""Low-rank operators decode as the matrices that they stand for: the loop multiplies by the dense J_i = U B_i."""

from __future__ import annotations

import pytest
import pytest_asyncio
import torch

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from steer_server.engine.hf.engine import HFEngine
from steer_server.types import Row, SamplingParams

PROMPT = "Here is a painting of the bridge"
TEXTS = ("the golden dress", "Here is the Golden Gate Bridge", "the bride wore it in the bay")
SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True)
STRENGTH = 0.9


@pytest_asyncio.fixture(loop_scope="session", params=["llama", "qwen2", "gemma3", "gpt2"])
async def served(request, tiny):
    loaded = tiny(request.param, fresh=True)
    # See test_families: a head of its own, and no end of sequence.
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(loaded.model.lm_head.weight.shape, generator=generator, dtype=loaded.dtype)
    loaded.model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    loaded.model.config.eos_token_id = loaded.model.generation_config.eos_token_id = None
    engine = HFEngine(loaded, max_queue=4)
    yield loaded, engine
    await engine.close()


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one text", "three texts"])
@pytest.mark.parametrize(("rule", "blend"), [("cumulative", 0.0), ("substitute", 0.0), ("cumulative", 0.4)])
async def test_an_operator_of_rank_5_decodes_as_its_dense_product(
    texts, rule, blend, served, decode, steered_row, recompute
):
    loaded, engine = served
    concepts = tuple(concept_from_text(text, loaded) for text in texts)
    artifact = build_operator(BuildSpec(concepts, layer=2, rank=5), loaded)
    assert artifact.basis is not None
    assert artifact.factors.shape == (max(len(each.ids) for each in concepts), 5, loaded.hidden_size)
    [(ids, end)] = await decode(engine, PROMPT, SAMPLING, steered_row(artifact, STRENGTH, rule, blend))
    prompt_ids = loaded.tokenizer(PROMPT)["input_ids"]
    assert [ids] == recompute(loaded.model, artifact, prompt_ids, [STRENGTH], SAMPLING.max_tokens, rule, blend)
    assert end.receipts[0].mean_dose == pytest.approx(STRENGTH / 2, abs=1e-5)
    [(plain, _)] = await decode(engine, PROMPT, SAMPLING, Row())
    assert ids != plain


@pytest.mark.model
async def test_an_operator_of_rank_64_of_the_default_model_decodes_as_its_dense_product(
    smollm, engine, operator_of, decode, steered_row, recompute
):
    loaded, prompt = smollm(), "Here is a painting of the"
    artifact = operator_of("The Golden Gate Bridge in San", "residual", 15, 64)
    assert artifact.basis.shape == (loaded.hidden_size, 64)
    for rule, blend in (("cumulative", 0.5), ("substitute", 0.0)):
        [(ids, _)] = await decode(engine, prompt, SamplingParams(max_tokens=8), steered_row(artifact, 0.4, rule, blend))
        prompt_ids = loaded.tokenizer(prompt)["input_ids"]
        assert [ids] == recompute(loaded.model, artifact, prompt_ids, [0.4], 8, rule, blend)
