"""Texts that are decoded together are those of one request each: samples, arms, arms with a sampling of their own."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from operators.core.positions import Positions
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
    Delta,
    GenerationRequest,
    NamedPrompt,
    OperatorUse,
    Prompt,
    SamplingParams,
    Started,
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


async def test_the_samples_of_a_generation_are_the_texts_of_requests_with_their_seeds(engine, registry, alone):
    request = GenerationRequest("r", PROMPT, RANDOM, GOLDEN, n=3)
    events = [event async for event in generate(engine, registry, request)]
    texts = {event.sample: event for event in events if isinstance(event, Completion)}
    assert [event.sample for event in events if isinstance(event, Started)] == [0, 1, 2]
    for sample in range(3):
        deltas = [event for event in events if isinstance(event, Delta) and event.sample == sample]
        lone = await alone(GOLDEN, RANDOM.of_sample(sample))
        assert texts[sample].token_ids == lone.token_ids
        assert texts[sample].text == lone.text == "".join(delta.text for delta in deltas)
        assert (texts[sample].receipts[0].digest, texts[sample].seed) == (lone.receipts[0].digest, lone.seed)


async def test_of_several_prompts_each_has_the_texts_of_a_comparison_with_it_alone(engine, registry):
    arms = (Arm("a", GOLDEN), Arm("b", (), replace(OWN, logprobs=None)))
    prompts = [Prompt(text=text) for text in ("The sea", PROMPT.text, "My friend and I", "Yesterday I saw", "It")]
    seeds = (None, 2**64 - 1, None, 3, 4)
    named = tuple(NamedPrompt(f"p{index}", prompt, seeds[index]) for index, prompt in enumerate(prompts))
    request = CompareRequest("r", None, RANDOM, arms, n=2, prompts=named)
    events = [event async for event in compare(engine, registry, request, max_arms=8)]
    assert engine.running + engine.waiting == 0
    together = {prompt.id: [event for event in events if event.prompt_id == prompt.id] for prompt in named}
    assert sum(map(len, together.values())) == len(events)
    for prompt in named[:3]:
        own = RANDOM if prompt.seed is None else replace(RANDOM, seed=prompt.seed)
        lone = CompareRequest("r", prompt.prompt, own, arms, n=2)
        expected = [event async for event in compare(engine, registry, lone, max_arms=8)]
        found = together[prompt.id]
        assert texts_of(found) == texts_of(expected)
        assert [(each.arm, each.sample, each.first_divergence) for each in found[-1].comparisons] == [
            (each.arm, each.sample, each.first_divergence) for each in expected[-1].comparisons
        ]
        for one, other in zip(found[-1].comparisons, expected[-1].comparisons, strict=True):
            assert one.kl_per_token == pytest.approx(other.kl_per_token, abs=1e-4)
    for found in together.values():
        assert isinstance(found[-1], Compared)
        assert [type(event.event) for event in found[:6]] == [Started] * 6


def texts_of(events):
    return {
        (event.arm, event.event.sample): (event.event.token_ids, event.event.text, event.event.seed)
        for event in events
        if isinstance(event, ArmEvent) and isinstance(event.event, Completion)
    }


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (Prompt(token_ids=(1, 10**6)), "prompts[3].prompt.token_ids[1]"),
        (Prompt(token_ids=(1,) * 10_000), "prompts[3].prompt"),
    ],
    ids=["an id that is none", "too long"],
)
async def test_one_prompt_of_many_that_is_bad_fails_the_call_before_anything_runs(engine, registry, prompt, field):
    named = tuple(NamedPrompt(str(index), prompt if index == 3 else PROMPT) for index in range(5))
    before = engine.work.prompt_tokens
    with pytest.raises(InvalidRequestError) as caught:
        await anext(compare(engine, registry, CompareRequest("r", None, RANDOM, (), prompts=named), max_arms=8))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert (engine.work.prompt_tokens, engine.running + engine.waiting) == (before, 0)


async def test_operators_that_do_not_fit_one_prompt_of_many_say_with_which(engine, registry):
    prompts = (Prompt(text="The sea and the sky are blue"), Prompt(text="It"))
    named = tuple(NamedPrompt(str(index), prompt) for index, prompt in enumerate(prompts))
    use = OperatorUse("golden", 0.4, positions=Positions.parse("prompt:3.."))
    request = CompareRequest("r", None, RANDOM, (Arm("a", (use,)),), prompts=named)
    with pytest.raises(InvalidRequestError, match=r"the prompt has \d tokens \(with prompts\[1\]\)$") as caught:
        await anext(compare(engine, registry, request, max_arms=8))
    assert caught.value.field == "arms[0].operators[0].positions"


async def test_who_leaves_amid_many_prompts_leaves_nothing_behind(engine, registry):
    named = tuple(NamedPrompt(str(index), PROMPT) for index in range(12))
    long = replace(RANDOM, max_tokens=200)
    request = CompareRequest("r", None, long, (Arm("a", GOLDEN),), prompts=named)
    async with aclosing(compare(engine, registry, request, max_arms=8)) as events:
        async for event in events:
            if isinstance(event, ArmEvent) and isinstance(event.event, Delta):
                break
    async with asyncio.timeout(20):
        while engine.running + engine.waiting:
            await asyncio.sleep(0.05)


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
