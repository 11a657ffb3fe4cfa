"""Every architecture that can be built can be served: small random models, windows shorter than the prompts."""

from __future__ import annotations

import pytest
import pytest_asyncio
import torch

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.model.loading import recognise
from steer_server.engine.hf.engine import HFEngine
from steer_server.types import Row, SamplingParams
from tests.odd_models import odd_model

PROMPT = "Here is a painting of the bridge"
SAMPLING = SamplingParams(max_tokens=16, ignore_eos=True)
STRENGTH = 0.9


@pytest_asyncio.fixture(loop_scope="session")
async def served(family, tiny):
    loaded = tiny(family, fresh=True)
    # A head of its own: tied to large random embeddings, a model repeats its last token whatever is done to it.
    generator = torch.Generator().manual_seed(1)
    shape, dtype = loaded.model.lm_head.weight.shape, loaded.dtype
    head = torch.randn(shape, generator=generator, dtype=dtype)
    loaded.model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    # The recompute loop stops at this token, and a random model is as likely to say it as any other.
    loaded.model.config.eos_token_id = loaded.model.generation_config.eos_token_id = None
    engine = HFEngine(loaded, max_queue=4)
    yield loaded, engine
    await engine.close()


@pytest.mark.parametrize("profile", ["golden", "residual"])
@pytest.mark.parametrize(("rule", "blend"), [("cumulative", 0.0), ("substitute", 0.0), ("cumulative", 0.4)])
async def test_cached_steering_equals_recomputing_everything(
    profile, rule, blend, served, decode, steered_row, recompute
):
    loaded, engine = served
    artifact = build_operator(BuildSpec((concept_from_text("the golden dress", loaded),), profile, 2), loaded)
    prompt_ids = loaded.tokenizer(PROMPT)["input_ids"]
    row = steered_row(artifact, STRENGTH, rule, blend)
    [(ids, end)] = await decode(engine, PROMPT, SAMPLING, row)
    assert [ids] == recompute(loaded.model, artifact, prompt_ids, [STRENGTH], SAMPLING.max_tokens, rule, blend)
    assert end.receipts[0].generated_tokens_steered == SAMPLING.max_tokens - 1
    [(plain, _)] = await decode(engine, PROMPT, SAMPLING, Row())
    assert ids != plain


async def test_rows_of_different_length_in_one_batch_give_the_ids_of_their_solo_runs(served, decode, steered_row):
    loaded, engine = served
    artifact = build_operator(BuildSpec((concept_from_text("the golden dress", loaded),), "residual", 2), loaded)
    strengths = (0.9, -0.9, 2.0, 0.0)
    rows = [Row(), *(steered_row(artifact, strength) for strength in strengths)]
    solo = [(await decode(engine, PROMPT, SAMPLING, row))[0][0] for row in rows]
    # Rows leave the batch at different steps, so the cache is cut down while others go on.
    stops = tuple({ids[3 + index] for index, ids in enumerate(solo[:3])})
    sampling = SamplingParams(max_tokens=16, ignore_eos=True, stop_token_ids=stops)
    expected = [(await decode(engine, PROMPT, sampling, row))[0][0] for row in rows]
    scored = [Row(row.plan, score=True) for row in rows]
    together = [ids for ids, _ in await decode(engine, PROMPT, sampling, *scored)]
    assert together == expected
    assert len({len(ids) for ids in expected}) > 1


async def test_plain_rows_give_the_ids_of_transformers_generate(served, decode):
    loaded, engine = served
    ids = torch.tensor([loaded.tokenizer(PROMPT)["input_ids"]])
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    expected = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
    [(plain, _)] = await decode(engine, PROMPT, SAMPLING, Row())
    assert plain == expected.tolist()


@pytest.mark.parametrize("name", ["granite", "gpt_neox", "cohere2", "gpt_oss", "deepseek_v3"])
async def test_blocks_of_every_wiring_are_pushed_where_they_are_handed_their_input(
    name, tiny_tokenizer, decode, steered_row, recompute
):
    # Embeddings times a constant; attention and MLP side by side; sinks; keys and values out of a latent vector.
    model = odd_model(name, vocab_size=len(tiny_tokenizer), tie_word_embeddings=False)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    loaded = recognise(name, model, tiny_tokenizer)
    artifact = build_operator(BuildSpec((concept_from_text("the golden dress", loaded),), "residual", 2), loaded)
    engine = HFEngine(loaded, max_queue=4)
    try:
        [(ids, end)] = await decode(engine, PROMPT, SAMPLING, steered_row(artifact, STRENGTH))
        [(plain, _)] = await decode(engine, PROMPT, SAMPLING, Row())
    finally:
        await engine.close()
    prompt_ids = loaded.tokenizer(PROMPT)["input_ids"]
    assert [ids] == recompute(model, artifact, prompt_ids, [STRENGTH], SAMPLING.max_tokens)
    assert end.receipts[0].generated_tokens_steered == SAMPLING.max_tokens - 1
    assert ids != plain
