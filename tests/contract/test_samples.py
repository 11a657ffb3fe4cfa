"""Texts that are decoded together are those of one request each: samples, arms, arms with a sampling of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from operators.core.store import Store
from steer_server.compare import compare
from steer_server.errors import InvalidRequestError
from steer_server.generate import generate
from steer_server.registry import Registry
from steer_server.types import (
    NORMAL,
    Arm,
    ArmEvent,
    ArmSampling,
    Compared,
    CompareRequest,
    Completion,
    GenerationRequest,
    OperatorUse,
    Prompt,
    SamplingParams,
)

pytestmark = pytest.mark.model

PROMPT = Prompt(text="Here is a painting of the")
RANDOM = SamplingParams(temperature=1.0, seed=2**64 - 2, max_tokens=8, ignore_eos=True)
GOLDEN = (OperatorUse("golden", 0.4),)
OWN = ArmSampling(temperature=0.7, top_k=20, repetition_penalty=1.3, max_tokens=5, logprobs=1)


@pytest.fixture
def registry(engine, operator_of, tmp_path):
    Store(tmp_path).save("golden", operator_of("The Golden Gate Bridge in San", "golden", 21))
    return Registry(Store(tmp_path), engine.model, max_bytes=1 << 30, max_dose=1.0)


@pytest.fixture
def alone(engine, registry):
    """``await alone(operators, sampling)``: the text of a request of its own."""

    async def run(operators, sampling):
        request = GenerationRequest("r", PROMPT, sampling, operators)
        return [event async for event in generate(engine, registry, request)][-1]

    return run


async def compared(engine, registry, *arms, **fields):
    """The texts by arm and sample, and the comparisons."""
    request = CompareRequest("r", PROMPT, RANDOM, arms, **fields)
    events = [event async for event in compare(engine, registry, request, max_arms=8)]
    ends = [event for event in events if isinstance(event, ArmEvent) and isinstance(event.event, Completion)]
    assert isinstance(events[-1], Compared)
    return {(end.arm, end.event.sample): end.event for end in ends}, events[-1].comparisons


async def test_a_sample_is_the_text_of_a_request_with_its_seed(engine, registry, alone):
    texts, comparisons = await compared(engine, registry, Arm("a", GOLDEN), n=3)
    seeds = [2**64 - 2, 2**64 - 1, 0]
    assert sorted(texts) == [(arm, sample) for arm in ("a", NORMAL) for sample in range(3)]
    for (arm, sample), text in texts.items():
        assert text.seed == seeds[sample]
        lone = await alone(() if arm == NORMAL else GOLDEN, replace(RANDOM, seed=seeds[sample]))
        assert text.token_ids == lone.token_ids
    assert len({text.token_ids for text in texts.values()}) > 2
    assert [(each.arm, each.sample) for each in comparisons] == [("a", sample) for sample in range(3)]
    for each in comparisons:
        assert len(each.kl_per_token) == RANDOM.max_tokens
        assert each.normal_perplexity is not None


async def test_an_arm_with_a_sampling_of_its_own_is_the_text_of_a_request_with_it(engine, registry, alone):
    arms = (Arm("steered", GOLDEN, OWN), Arm("plain", (), replace(OWN, seed=5)), Arm("as asked", GOLDEN))
    texts, comparisons = await compared(engine, registry, *arms, normal=False)
    asked = {"steered": OWN.within(RANDOM), "plain": replace(OWN, seed=5).within(RANDOM), "as asked": RANDOM}
    for arm in arms:
        text = texts[arm.name, 0]
        lone = await alone(arm.operators, asked[arm.name])
        assert (text.token_ids, text.seed, len(text.logprobs)) == (lone.token_ids, lone.seed, len(lone.logprobs))
        assert len(text.token_ids) == asked[arm.name].max_tokens
    # Scored without a plain text beside them: a plain arm is as likely to the plain model as it says itself.
    by_arm = {each.arm: each for each in comparisons}
    assert all(each.first_divergence is each.normal_perplexity is None for each in comparisons)
    assert max(by_arm["plain"].kl_per_token) == 0.0 < min(by_arm["steered"].kl_mean, by_arm["as asked"].kl_mean)
    assert all(each.steered_perplexity > 1.0 for each in comparisons)


async def test_the_plain_arm_may_be_alone(engine, registry, alone):
    texts, comparisons = await compared(engine, registry, n=2, score=False)
    assert comparisons == ()
    assert [texts[NORMAL, sample].token_ids for sample in range(2)] == [
        (await alone((), RANDOM.of_sample(sample))).token_ids for sample in range(2)
    ]


@pytest.mark.parametrize(
    ("own", "field"),
    [
        (ArmSampling(stop_token_ids=(10**6,)), "arms[1].sampling.stop_token_ids[0]"),
        (ArmSampling(stop_strings=("<|im_end|>\n",)), "arms[1].sampling.stop_strings[0]"),
    ],
)
async def test_what_an_engine_refuses_of_an_arms_sampling_is_named_where_it_stands(engine, registry, own, field):
    request = CompareRequest("r", PROMPT, RANDOM, (Arm("a", GOLDEN), Arm("b", GOLDEN, own)))
    with pytest.raises(InvalidRequestError) as caught:
        await anext(compare(engine, registry, request, max_arms=8))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert engine.running + engine.waiting == 0
