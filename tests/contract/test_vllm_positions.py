"""Operators that push some positions only: on vLLM the ids, receipts and scores of the reference engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import pytest_asyncio

from operators.core.apply import Setting
from operators.core.positions import Positions
from steer_server.engine.hf.engine import HFEngine
from steer_server.types import Application, DecodeJob, Prompt, Row, SamplingParams, SteeringPlan, TokenEvent

pytestmark = [pytest.mark.model, pytest.mark.vllm]

PROMPTS = ("I went to new york to see the", "My")
SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)
RULES = ("first", "1..", "3..12", "generated")


@pytest.fixture
def rows(operator_of, steered_row):
    """Several rules of positions; two operators of one layer whose positions overlap; two layers, each at its own."""
    bridge = operator_of("The Golden Gate Bridge in San", "residual", 15, 64)
    wedding = operator_of("The wedding was beautiful and the bride", "residual", 15, 64)
    published = operator_of("The wedding was beautiful and the bride", "golden", 21, "full")

    def together(*uses):
        applied = (
            Application("operator", artifact, Setting(strength, rule, blend, Positions.parse(positions)), ())
            for artifact, strength, rule, blend, positions in uses
        )
        return Row(SteeringPlan(tuple(applied)))

    return {
        "plain": Row(),
        **{rule: steered_row(bridge, 1.2 if rule == "first" else 0.5, positions=rule) for rule in RULES},
        "substitute, blended, generated": steered_row(wedding, 0.5, "substitute", 0.5, positions="generated"),
        "overlapping": together((bridge, 0.4, "cumulative", 0.0, "0..6"), (wedding, 0.4, "substitute", 0.5, "4..14")),
        "two layers": together(
            (bridge, 0.9, "cumulative", 1.0, "first"), (published, 0.4, "cumulative", 0.0, "generated")
        ),
    }


@pytest_asyncio.fixture(loop_scope="session")
async def reference(smollm):
    engine = HFEngine(smollm(), max_queue=len(PROMPTS))
    yield engine
    await engine.close()


def told(receipt):
    """What both engines must say alike."""
    return (
        receipt.positions,
        receipt.prompt_tokens_steered + receipt.prompt_tokens_cached,
        receipt.generated_tokens_steered,
        receipt.dose_bound,
    )


async def test_positions_give_the_ids_and_receipts_of_the_reference_engine(vllm_engine, reference, rows, decode):
    engine = await vllm_engine()
    expected = [await decode(reference, prompt, SAMPLING, *rows.values()) for prompt in PROMPTS]
    found = await asyncio.gather(*(decode(engine, prompt, SAMPLING, *rows.values()) for prompt in PROMPTS))
    for prompt, of_prompt, of_reference in zip(PROMPTS, found, expected, strict=True):
        num_prompt = len(await engine.encode(Prompt(text=prompt)))
        for (name, row), (ids, end), (reference_ids, reference_end) in zip(
            rows.items(), of_prompt, of_reference, strict=True
        ):
            assert ids == reference_ids, (prompt, name)
            assert [told(one) for one in end.receipts] == [told(one) for one in reference_end.receipts]
            for use, receipt in zip(row.plan.applications if row.plan else (), end.receipts, strict=True):
                fed = num_prompt + len(ids) - 1
                num_due = use.setting.positions.count(0, fed, prompt_tokens=num_prompt)
                steered = receipt.prompt_tokens_steered + receipt.generated_tokens_steered
                assert steered + receipt.prompt_tokens_cached == num_due > 0, (prompt, name)
        # The positions are heard.
        texts = [tuple(ids) for ids, _ in of_prompt]
        assert len(set(texts)) > len(texts) // 2, prompt


async def test_a_text_steered_at_its_first_token_is_scored_as_by_the_reference_engine(
    vllm_engine, reference, rows, decode
):
    engine, sampling = await vllm_engine(), replace(SAMPLING, max_tokens=8)
    scored = [Row(rows[name].plan, score=True) for name in ("first", "generated")]
    found = await decode(engine, PROMPTS[0], sampling, *scored)
    expected = [[], []]
    prompt_ids = await reference.encode(Prompt(text=PROMPTS[0]))
    async for event in reference.submit(DecodeJob.of(prompt_ids, sampling, tuple(scored))):
        if isinstance(event, TokenEvent):
            expected[event.row].append(event.score)
    for (_, end), scores in zip(found, expected, strict=True):
        assert [score.kl for score in end.scores] == pytest.approx([score.kl for score in scores], abs=1e-3)
        assert max(score.kl for score in scores) > 1e-3
    # What pushes generated tokens alone leaves the first of them as it was.
    assert found[1][1].scores[0].kl < 1e-6 < found[0][1].scores[0].kl
