"""Texts that are given, under several arms: against what a comparison reported, and one pass over all of the text."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from operators.core.apply import Setting
from operators.core.positions import Positions
from operators.core.store import Store
from operators.model.steered import steered
from steer_server.caps import Caps
from steer_server.compare import compare
from steer_server.errors import InvalidRequestError, TimeLimitError
from steer_server.registry import Registry
from steer_server.score import score
from steer_server.types import (
    Arm,
    ArmSampling,
    Compared,
    CompareRequest,
    Completion,
    OperatorUse,
    Prompt,
    SamplingParams,
    ScoreRequest,
    TokenReport,
)
from tests.contract.conftest import PUSHED

pytestmark = pytest.mark.model

PROMPT = Prompt(text="Here is a painting of the")
TEXT = " old bridge across the bay, and of a small red boat that waits below it for the tide to turn."
ARMS = tuple(
    Arm(name, (OperatorUse("bridge", strength, positions=Positions.parse(positions)),))
    for name, strength, positions in (
        ("loud", 0.5, "all"),
        ("away", -0.3, "all"),
        ("prompt", 0.6, "prompt"),
        ("generated", 0.4, "generated"),
        ("first", 1.2, "first"),
        ("range", 0.5, "3..9"),
        ("silent", 0.0, "all"),
    )
)


@pytest.fixture
def registry(engine, operator_of, tmp_path):
    Store(tmp_path).save("bridge", operator_of("The Golden Gate Bridge in San", "golden", 21))
    return Registry(Store(tmp_path), engine.model, max_bytes=1 << 30, max_dose=1.0)


async def scored(engine, registry, **asked):
    request = ScoreRequest("r", **{"prompt": PROMPT, "arms": ARMS} | asked)
    return [event async for event in score(engine, registry, request, max_arms=8)][-1]


def logprobs(loaded, prompt, text, artifact=None, use=None):
    """(m, V): what the model makes of each token of the text in one pass, with its prompt as a pass before it."""
    plain = Setting(0.0, "cumulative", 0.0)
    setting = plain if use is None else Setting(use.strength, "cumulative", 0.0, use.positions)
    with torch.no_grad(), steered(loaded, artifact, setting):
        begun = loaded.model(torch.tensor([prompt]), past_key_values=DynamicCache(config=loaded.model.config))
        parts = [begun.logits[0, -1:]]
        if len(text) > 1:
            past = begun.past_key_values
            parts.append(loaded.model(torch.tensor([text[:-1]]), past_key_values=past).logits[0])
    return torch.cat(parts).float().log_softmax(-1)


async def test_every_arm_reads_the_text_as_one_pass_of_the_steered_model_does(smollm, engine, registry, operator_of):
    loaded, artifact = smollm(), operator_of("The Golden Gate Bridge in San", "golden", 21)
    arms = tuple(Arm(arm.name, (use,)) for arm in ARMS for use in arm.operators)
    found = await scored(engine, registry, text=TEXT, arms=arms)
    prompt, text = list(found.prompt_token_ids), list(found.token_ids)
    assert text == loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    plain = logprobs(loaded, prompt, text, artifact)
    for arm, read in zip((None, *arms), found.arms, strict=True):
        use = None if arm is None else arm.operators[0]
        expected = logprobs(loaded, prompt, text, artifact, use)
        at = torch.arange(len(text))
        own, normal = (torch.tensor([getattr(t, name) for t in read.tokens]) for name in ("logprob", "normal_logprob"))
        torch.testing.assert_close(own, expected[at, text], atol=3e-4, rtol=1e-4)
        torch.testing.assert_close(normal, plain[at, text], atol=3e-4, rtol=1e-4)
        kl = (plain.exp() * (plain - expected)).sum(-1)
        torch.testing.assert_close(torch.tensor([t.kl for t in read.tokens]), kl, atol=1e-3, rtol=1e-3)
        assert read.perplexity == pytest.approx(math.exp(-float(own.mean())), rel=1e-4)
        assert "".join(t.token for t in read.tokens) == TEXT


async def test_a_generated_text_scores_as_the_comparison_said(engine, registry):
    arms = ARMS[:2]
    request = CompareRequest("r", PROMPT, SamplingParams(max_tokens=12, logprobs=0), arms)
    events = [event async for event in compare(engine, registry, request, max_arms=8)]
    texts = {each.arm: each.event for each in events[:-1] if isinstance(each.event, Completion)}
    assert isinstance(events[-1], Compared)
    for arm, compared in zip(arms, events[-1].comparisons, strict=True):
        found = await scored(engine, registry, token_ids=texts[arm.name].token_ids, arms=(arm,))
        normal, loud = found.arms
        assert [t.logprob for t in loud.tokens] == pytest.approx(
            [each.logprob for each in texts[arm.name].logprobs], abs=1e-4
        )
        assert [t.kl for t in loud.tokens] == pytest.approx(compared.kl_per_token, abs=1e-4)
        assert (loud.kl_mean, loud.kl_p95) == pytest.approx((compared.kl_mean, compared.kl_p95), abs=1e-4)
        # A comparison's perplexities are those of the plain model.
        assert normal.perplexity == pytest.approx(compared.steered_perplexity, rel=1e-4)
        (receipt,), (of_comparison,) = loud.receipts, texts[arm.name].receipts
        steered_tokens = receipt.prompt_tokens_steered, receipt.generated_tokens_steered
        assert steered_tokens == (
            of_comparison.prompt_tokens_steered + of_comparison.prompt_tokens_cached,
            of_comparison.generated_tokens_steered,
        )
        assert receipt.positions_checked >= 2
        assert receipt.mean_dose == pytest.approx(abs(arm.operators[0].strength) / 2, rel=1e-4)


async def test_the_plain_model_has_no_divergence_and_strength_zero_is_the_plain_model(engine, registry):
    found = await scored(engine, registry, text=TEXT)
    normal, silent = found.arms[0], found.arms[-1]
    assert [(t.kl, t.logprob - t.normal_logprob) for t in normal.tokens] == [(0.0, 0.0)] * len(found.token_ids)
    assert (normal.kl_mean, normal.kl_p95, normal.receipts) == (0.0, 0.0, ())
    assert max(t.kl for t in silent.tokens) < 1e-6
    assert [t.logprob for t in silent.tokens] == pytest.approx([t.logprob for t in normal.tokens], abs=1e-4)
    (receipt,) = silent.receipts
    assert (receipt.prompt_tokens_steered, receipt.generated_tokens_steered) == (0, 0)


async def test_a_text_without_a_prompt_begins_with_its_first_token(smollm, engine, registry, operator_of):
    found = await scored(engine, registry, prompt=None, text=TEXT[1:], arms=ARMS[:1])
    ids = smollm().tokenizer(TEXT[1:])["input_ids"]
    assert (found.prompt_token_ids, found.token_ids) == (tuple(ids[:1]), tuple(ids[1:]))
    plain = logprobs(smollm(), ids[:1], ids[1:], operator_of("The Golden Gate Bridge in San", "golden", 21))
    at = torch.arange(len(ids) - 1)
    assert [t.logprob for t in found.arms[0].tokens] == pytest.approx(plain[at, ids[1:]].tolist(), abs=3e-4)
    alone = await scored(engine, registry, prompt=None, token_ids=tuple(ids), arms=())
    assert [t.logprob for t in alone.arms[0].tokens] == pytest.approx(
        [t.logprob for t in found.arms[0].tokens], abs=1e-4
    )
    assert [arm.arm for arm in alone.arms] == ["normal"]


REPORT = TokenReport(top=3, words=("bridge", "unfathomable", "the"), doses=True)


def masses(loaded, distribution):
    """Of each word its tokens by hand: with one token of its own or more, else the first one behind a space."""
    ids = loaded.tokenizer(["bridge", " bridge", "Bridge", " Bridge", "the", " the", "The", " The", " unfathomable"])
    ids = [each[0] if len(each) == 1 or place == 8 else None for place, each in enumerate(ids["input_ids"])]
    words = ids[:4], ids[8:], ids[4:8]
    return [float(distribution[[token for token in word if token is not None]].exp().sum()) for word in words]


async def test_a_report_says_of_every_token_what_two_distributions_say(smollm, engine, registry, operator_of):
    arms = (ARMS[0], ARMS[3], ARMS[5], ARMS[6])
    found = await scored(engine, registry, text=TEXT, arms=arms, report=REPORT)
    loaded, artifact = smollm(), operator_of("The Golden Gate Bridge in San", "golden", 21)
    prompt, text = list(found.prompt_token_ids), list(found.token_ids)
    plain = logprobs(loaded, prompt, text, artifact)
    normal = found.arms[0]
    assert [(t.gained, t.lost, t.dose) for t in normal.tokens] == [((), (), None)] * len(text)
    for arm, read in zip(arms, found.arms[1:], strict=True):
        (use,) = arm.operators
        steered = logprobs(loaded, prompt, text, artifact, use)
        for place, token in enumerate(read.tokens):
            p, q = plain[place], steered[place]
            likeliest = [set(each.topk(3).indices.tolist()) for each in (p, q)]
            # Where two are as likely as each other, either may be the third.
            close = any(float(each.topk(4).values[2] - each.topk(4).values[3]) < 1e-3 for each in (p, q))
            if not close:
                assert {each.token_id for each in token.gained} == likeliest[1] - likeliest[0]
                assert {each.token_id for each in token.lost} == likeliest[0] - likeliest[1]
            assert [each.logprob for each in token.gained] == pytest.approx(
                [float(q[each.token_id]) for each in token.gained], abs=1e-3
            )
            assert [each.token for each in token.lost] == [loaded.tokenizer.decode([t.token_id]) for t in token.lost]
            assert [mass.word for mass in token.words] == list(REPORT.words)
            assert [mass.normal for mass in token.words] == pytest.approx(masses(loaded, p), abs=1e-4)
            assert [mass.arm for mass in token.words] == pytest.approx(masses(loaded, q), abs=1e-4)
        due = [
            abs(use.strength) / 2 * PUSHED[str(use.positions)](len(prompt) + place, len(prompt))
            for place in range(len(text) - 1)
        ]
        expected = [None] * len(text) if use.strength == 0 else [*due, None]
        assert [token.dose for token in read.tokens] == [
            each if each is None else pytest.approx(each, rel=1e-3) for each in expected
        ]


async def test_a_comparison_reports_of_its_texts_what_a_score_of_them_does(engine, registry):
    sampled = Arm("sampled", (), ArmSampling(temperature=1.0, seed=3, max_tokens=6))
    request = CompareRequest(
        "r", PROMPT, SamplingParams(max_tokens=6, ignore_eos=True), (ARMS[0], ARMS[3], sampled), report=REPORT
    )
    events = [event async for event in compare(engine, registry, request, max_arms=8)]
    texts = {each.arm: each.event for each in events[:-1] if isinstance(each.event, Completion)}
    assert [len(each.tokens) for each in events[-1].comparisons] == [6] * 3
    for arm, compared in zip(request.arms, events[-1].comparisons, strict=True):
        arms = (arm,) if arm.operators else ()
        read = await scored(engine, registry, token_ids=texts[arm.name].token_ids, arms=arms, report=REPORT)
        for one, other in zip(compared.tokens, read.arms[-1].tokens, strict=True):
            assert (one.token_id, one.token) == (other.token_id, other.token)
            assert (one.logprob, one.normal_logprob, one.kl) == pytest.approx(
                (other.logprob, other.normal_logprob, other.kl), abs=1e-4
            )
            assert [(mass.normal, mass.arm) for mass in one.words] == [
                pytest.approx((mass.normal, mass.arm), abs=1e-4) for mass in other.words
            ]
            assert one.dose == (None if other.dose is None else pytest.approx(other.dose, rel=1e-3))
    assert events[-1].comparisons[2].tokens[0].words[0].normal == events[-1].comparisons[2].tokens[0].words[0].arm
    assert max(token.dose or 0.0 for token in events[-1].comparisons[1].tokens) == pytest.approx(0.2, rel=1e-3)


async def test_a_report_that_cannot_be_made_is_refused_by_name(engine, registry):
    for report, field, says in (
        (TokenReport(words=("sea", " ")), "report.words[1]", "0 characters"),
        (TokenReport(words=("<|im_end|>",)), "report.words[0]", "no tokens of the model"),
        (TokenReport(top=20), "report", "asks for up to 328000 figures, 41 of each of 8000 tokens"),
    ):
        ids = (5,) * (1000 if report.top else 2)
        with pytest.raises(InvalidRequestError, match=says) as caught:
            await scored(engine, registry, prompt=None, token_ids=(5, *ids), report=report)
        assert caught.value.field == field
        sampling = SamplingParams(max_tokens=8000)
        request = CompareRequest("r", PROMPT, sampling, ARMS[:1], report=report)
        with pytest.raises(InvalidRequestError) as caught:
            await anext(compare(engine, registry, request, max_arms=8))
        assert caught.value.field == field
    for bad, field in (({"top": 21}, "report.top"), ({"words": ("a",) * 33}, "report.words")):
        with pytest.raises(InvalidRequestError) as caught:
            ScoreRequest("r", PROMPT, text="a", report=TokenReport(**bad))
        assert caught.value.field == field
    with pytest.raises(InvalidRequestError, match="`score` is not") as caught:
        CompareRequest("r", PROMPT, SamplingParams(), ARMS[:1], score=False, report=REPORT)
    assert caught.value.field == "report"


@pytest.mark.parametrize(
    ("asked", "field", "says"),
    [
        ({"text": ""}, "text", "is empty"),
        ({"token_ids": ()}, "token_ids", "is empty"),
        ({}, "text", "is missing; exactly one"),
        ({"text": "a", "token_ids": (1,)}, "text", "are both there; exactly one"),
        ({"token_ids": (5, -1)}, r"token_ids[1]", "is -1; 0 to "),
        ({"token_ids": (1 << 20,)}, r"token_ids[0]", "is 1048576; 0 to "),
        ({"token_ids": (5,), "prompt": None}, "token_ids", "is one token without a prompt"),
        ({"token_ids": (5,) * (1 << 14)}, "token_ids", "has 16384 tokens behind 6 of the prompt; the context"),
        ({"text": "word " * (1 << 14)}, "text", "at most|context"),
        ({"text": "a", "time_limit": 0.0}, "time_limit", "above 0"),
        ({"text": "a", "arms": (Arm("a", ()),)}, "arms[0].operators", "reads the text anyway"),
        (
            {"text": "a", "arms": (Arm("a", ARMS[0].operators, ArmSampling()),)},
            "arms[0].sampling",
            "nothing is decoded",
        ),
        ({"text": "a", "arms": ARMS + ARMS[:2]}, "arms[0].name", "a name of its own"),
        (
            {"text": "a", "arms": tuple(Arm(f"{i}", ARMS[0].operators) for i in range(9))},
            "arms",
            "has 9 arms; at most 8",
        ),
        (
            {
                "text": "a",
                "arms": (Arm("a", (OperatorUse("bridge", 0.4, positions=Positions.parse("generated:2..")),)),),
            },
            "arms[0].operators[0].positions",
            "begins at position 8",
        ),
    ],
)
async def test_what_cannot_be_scored_is_refused_by_name(engine, registry, asked, field, says):
    with pytest.raises(InvalidRequestError, match=says) as caught:
        await scored(engine, registry, **asked)
    assert caught.value.field == field
    assert (engine.running, engine.waiting) == (0, 0)


async def test_a_text_counts_as_tokens_and_takes_its_time_or_fails(engine, registry):
    caps = Caps(max_tokens=3, max_total_tokens=5, max_time=5.0)
    for ids, limit, field, says in (
        ((5,) * 4, None, "token_ids", "is 4 tokens; this server accepts 3"),
        ((5,) * 3, None, "token_ids", "is 3 tokens, in 2 texts 6; this server accepts 5"),
        ((5,) * 2, 6.0, "time_limit", "is 6 s; this server accepts 5 s"),
    ):
        request = ScoreRequest("r", PROMPT, token_ids=ids, arms=ARMS[:1], time_limit=limit)
        with pytest.raises(InvalidRequestError, match=says) as caught:
            await anext(score(engine, registry, request, max_arms=8, caps=caps))
        assert caught.value.field == field
    with pytest.raises(TimeLimitError, match=r"0\.001 s ran out before every token"):
        await scored(engine, registry, token_ids=(5,) * 400, time_limit=0.001)
