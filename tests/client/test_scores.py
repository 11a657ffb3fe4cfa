"""`client.score`: what is sent, what comes back, and what is not believed."""

import asyncio

import pytest
from google.protobuf.duration_pb2 import Duration
from steer_client import (
    AsyncSteerClient,
    InvalidRequestError,
    OperatorUse,
    ProtocolError,
    SteeringNotAppliedError,
    TokenReport,
)
from steering.v1 import comparison_pb2, score_pb2, text_pb2
from steering.v1 import steering_pb2 as sp

USES = [OperatorUse("golden-gate", 0.4)]
ARM = comparison_pb2.Arm(name="steered", operators=[sp.OperatorUse(name="golden-gate", strength=0.4)])


def answer_of(make, request):
    """The truth about a text of two tokens behind a prompt of six."""

    def arm(name, operators):
        tokens = [
            comparison_pb2.TokenComparison(token_id=token, token="x", logprob=-1.5, normal_logprob=-1.0, kl=0.25)
            for token in (11, 12)
        ]
        receipts = make.response(operators=operators).receipts
        for receipt in receipts:
            receipt.generated_tokens_steered = min(receipt.generated_tokens_steered, 1)
        return score_pb2.ArmScore(arm=name, tokens=tokens, kl_mean=0.25, kl_p95=0.25, perplexity=4.5, receipts=receipts)

    return score_pb2.ScoreResponse(
        request_id="r1",
        prompt_token_ids=range(6),
        token_ids=[11, 12],
        arms=[arm("normal", ()), *(arm(each.name, each.operators) for each in request.arms)],
        timings=text_pb2.Timings(queued=Duration(nanos=1000), total=Duration(seconds=1)),
    )


@pytest.fixture(autouse=True)
def truthful(fake, make):
    fake.scored = lambda request: answer_of(make, request)


def test_a_text_arrives_as_it_was_given_and_its_scores_by_the_names_of_the_arms(fake, client):
    found = client.score(" old bridge", prompt="Here is the", operators=USES, time_limit=2.5, request_id="mine")
    prompt = text_pb2.Prompt(text="Here is the")
    [sent] = fake.requests
    assert sent.time_limit.ToMilliseconds() == 2500
    sent.ClearField("time_limit")
    assert sent == score_pb2.ScoreRequest(request_id="mine", prompt=prompt, text=" old bridge", arms=[ARM])
    assert (found.token_ids, found.prompt_token_ids) == ((11, 12), tuple(range(6)))
    assert (found.normal.arm, list(found.steered)) == ("normal", ["steered"])
    steered = found.steered["steered"]
    assert (steered.kl_mean, steered.perplexity, steered.receipts[0].operator) == (0.25, 4.5, "golden-gate")
    assert [(each.logprob, each.normal_logprob, each.kl) for each in steered.tokens] == [(-1.5, -1.0, 0.25)] * 2


def test_a_report_is_sent_as_it_was_asked_for_and_read_as_it_was_sent(fake, client, make):
    answer = answer_of(make, score_pb2.ScoreRequest(arms=[ARM]))
    said = comparison_pb2.TokenComparison(
        gained=[text_pb2.TopLogprob(token_id=5, token=" sea", logprob=-2.0)],
        lost=[text_pb2.TopLogprob(token_id=6, token=" bay", logprob=-3.0)],
        words=[comparison_pb2.WordMass(word="sea", normal=0.1, arm=0.4)],
        dose=0.2,
    )
    answer.arms[1].tokens[0].MergeFrom(said)
    fake.scored = lambda _: answer
    found = client.score("a", prompt="b", operators=USES, words=["sea"], top=3, doses=True)
    assert fake.requests[0].report == comparison_pb2.TokenReport(top=3, words=["sea"], doses=True)
    first, last = found.steered["steered"].tokens
    assert (first.gained[0].token, first.lost[0].logprob, first.dose, last.dose) == (" sea", -3.0, 0.2, None)
    assert (first.words[0].word, first.words[0].normal, first.words[0].arm) == ("sea", 0.1, 0.4)
    client.compare("b", operators=USES, report=TokenReport(words=["sea"]))
    assert fake.requests[1].report == comparison_pb2.TokenReport(words=["sea"])
    with pytest.raises(InvalidRequestError, match=r"report\.words"):
        client.score("a", words="sea")


def test_token_ids_without_a_prompt_and_without_arms_are_sent_as_they_are(fake, client):
    found = client.score([11, 12])
    assert fake.requests == [score_pb2.ScoreRequest(token_ids=text_pb2.TokenIds(ids=[11, 12]))]
    assert (len(found.arms), found.steered) == (1, {})


def test_several_arms_have_their_names_on_both_clients(fake):
    async def ask():
        async with AsyncSteerClient(fake.target, timeout=20) as client:
            return await client.score("a", prompt=[5], arms={"a": USES, "b": [OperatorUse("other", 0.0)]})

    assert [arm.arm for arm in asyncio.run(ask()).arms] == ["normal", "a", "b"]


@pytest.mark.parametrize(
    ("text", "options", "field"),
    [
        (5, {}, "text"),
        (b"ab", {}, "text"),
        (["a"], {}, "token_ids[0]"),
        ("a", {"arms": {"a": USES}, "operators": USES}, "arms"),
        ("a", {"arms": ["a"]}, "arms"),
        ("a", {"time_limit": "x"}, "time_limit"),
    ],
)
def test_what_cannot_be_sent_is_named_and_not_sent(fake, client, text, options, field):
    with pytest.raises(InvalidRequestError) as caught:
        client.score(text, **options)
    assert (caught.value.field, fake.requests) == (field, [])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda answer: answer.arms.pop(), ProtocolError, "asked for were"),
        (lambda answer: answer.arms[1].tokens.pop(), ProtocolError, "not of the tokens"),
        (lambda answer: answer.arms[1].receipts.pop(), SteeringNotAppliedError, "receipts are for no operator"),
        (
            lambda answer: setattr(answer.arms[1].receipts[0], "generated_tokens_steered", 0),
            SteeringNotAppliedError,
            "expected were 6 [+] 1",
        ),
        (lambda answer: setattr(answer.arms[1].receipts[0], "strength", 0.5), SteeringNotAppliedError, "strength 0.5"),
    ],
)
def test_an_answer_without_its_arms_tokens_or_proof_is_an_error(fake, client, make, change, error, says):
    answer = answer_of(make, score_pb2.ScoreRequest(arms=[ARM]))
    change(answer)
    fake.scored = lambda _: answer
    with pytest.raises(error, match=says):
        client.score("a", prompt="b", operators=USES)
