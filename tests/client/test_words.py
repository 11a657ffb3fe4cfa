"""Words: how they are written, sent and proved."""

import pytest
from steer_client import (
    OperatorUse,
    Positions,
    Receipt,
    SamplingParams,
    SteeringNotAppliedError,
    WeightedWord,
    Word,
    Words,
)
from steer_client import _decode as decode
from steer_client import _encode as encode
from steer_client._cli.summaries import comparison_lines, receipt_line, steering_title
from steer_client._receipts import check_receipts
from steering.v1 import comparison_pb2
from steering.v1 import steering_pb2 as sp

LENS_DIGEST = "sha256:" + "9" * 64


def sent(use) -> sp.OperatorUse:
    """As the client sends it."""
    return encode.generate_request("", [use], SamplingParams(), "").operators[0]


@pytest.fixture
def receipt_of(make):
    return lambda use, **changes: _receipt(make, use, **changes)


@pytest.fixture
def checked(make):
    """``checked(use, **changes)``: the receipt of a use, but for the changes, as the client takes it."""

    def check(use, **changes) -> Receipt:
        message = make.response(receipts=[_receipt(make, use, **changes)])
        return check_receipts([use], decode.generation(message)).receipts[0]

    return check


def _receipt(make, use, **changes):
    words = [sp.SteeredWord(text=word.text, weight=word.weight, token_ids=[7, 9]) for word in use.words]
    values = {"words": words, "lens_digest": LENS_DIGEST, **changes}
    if use.kl is not None:
        values = {"kl": use.kl, "defaulted": ["rule", "blend", "positions", "anchor", "first_token"], **values}
    return make.receipt(sent(use), **values)


def test_a_word_is_the_use_of_a_lens():
    assert sent(Word("coffee")) == sp.OperatorUse(name="lens", words=[sp.WeightedWord(text="coffee", weight=1)])
    use = Words({"ocean": 1, "storm": -0.5}, kl=0.75, positions=Positions(start=1), lens="other")
    assert (use.name, use.strength, use.kl, str(use.positions)) == ("other", None, 0.75, "1..")
    assert use.words == (WeightedWord("ocean", 1), WeightedWord("storm", -0.5))
    assert sent(use).kl == 0.75
    assert Word("coffee", 0.12).strength == 0.12
    assert isinstance(use, OperatorUse)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("coffee", Word("coffee")),
        ("coffee=0.12", Word("coffee", 0.12)),
        ("hot air balloon=-0.2:1..", Word("hot air balloon", -0.2, positions=Positions(start=1))),
        ("ocean, storm*-0.5", Words({"ocean": 1.0, "storm": -0.5})),
        ("ocean*2,storm*0.5=0.3:first", Words({"ocean": 2.0, "storm": 0.5}, 0.3, positions=Positions(end=1))),
    ],
)
def test_words_are_read_as_they_are_written(text, expected):
    read = Words.parse_words(text)
    assert sent(read) == sent(expected)
    with_budget = Words.parse_words(text, kl=0.5, lens="mine")
    assert (with_budget.kl, with_budget.name) == (None if expected.strength is not None else 0.5, "mine")


@pytest.mark.parametrize(
    "text", ["", " ", "=0.2", "a,,b", "a, a", "a*x", "a*", "a=", "a=b", "a=1=2", "a:nowhere", "a*1*2"]
)
def test_what_are_no_words_is_quoted_with_what_is_accepted(text):
    with pytest.raises(ValueError, match=r"cannot read the (words|positions)") as caught:
        Words.parse_words(text)
    assert repr(text.partition(":")[2] or text) in str(caught.value)


def test_a_lens_is_pinned_by_its_own_digest(checked):
    pinned = Word("coffee", digest=LENS_DIGEST)
    assert sent(pinned).digest == LENS_DIGEST
    assert checked(pinned).lens_digest == LENS_DIGEST
    read = Words.parse_words("coffee", lens=f"mine,digest={LENS_DIGEST}")
    assert (read.name, read.digest) == ("mine", LENS_DIGEST)
    assert Words.parse_words("coffee").digest is None


def test_the_receipt_of_a_word_names_tokens_lens_and_budget(checked):
    receipt = checked(Word("coffee", kl=0.5))
    assert [(word.text, word.weight, word.token_ids) for word in receipt.words] == [("coffee", 1.0, (7, 9))]
    assert (receipt.lens_digest, receipt.kl) == (LENS_DIGEST, 0.5)
    assert checked(Word(" coffee ", 0.5), words=[sp.SteeredWord(text="coffee", weight=1, token_ids=[7])]).kl is None
    # A lens has a budget of its own.
    assert checked(Word("coffee"), kl=0.5).kl == 0.5
    assert checked(Word("coffee")).kl is None


@pytest.mark.parametrize(
    ("use", "changes", "problem"),
    [
        (Word("coffee"), {"words": []}, "words none, asked for were 'coffee' × 1"),
        (Word("coffee"), {"words": [sp.SteeredWord(text="tea", weight=1, token_ids=[7])]}, "words 'tea' × 1"),
        (
            Word("coffee"),
            {"words": [sp.SteeredWord(text="coffee", weight=-1, token_ids=[7])]},
            "'coffee' × -1",
        ),
        (
            Word("coffee"),
            {"words": [sp.SteeredWord(text="coffee", weight=1)]},
            "lacks the lens or the tokens",
        ),
        (Word("coffee"), {"lens_digest": ""}, "lacks the lens or the tokens"),
        (Word("coffee", digest="sha256:0"), {}, f"says digest {LENS_DIGEST}, asked for was sha256:0"),
        (Word("coffee", kl=0.5), {"kl": 0.6}, "p95 KL of 0.6, asked for was 0.5"),
        (Word("coffee", 0.5), {"kl": 0.5}, "p95 KL of 0.5, asked for was None"),
        (OperatorUse("golden-gate"), {"lens_digest": LENS_DIGEST}, "that of a lens, but of no word"),
        (OperatorUse("golden-gate"), {"lens_digest": "", "kl": 0.5}, "p95 KL of 0.5, asked for was None"),
    ],
)
def test_a_receipt_that_proves_other_words_or_another_budget_is_an_error(checked, use, changes, problem):
    with pytest.raises(SteeringNotAppliedError, match=problem):
        checked(use, **changes)


def test_the_summary_names_words_strength_and_both_budgets(make, checked, receipt_of):
    use = Words({"ocean": 1, "storm": -0.5}, kl=0.5)
    receipt = checked(use, strength=0.55)
    assert steering_title([receipt]) == "ocean + -0.5 × storm λ 0.55"
    line = receipt_line(receipt)
    assert "lens 'ocean' (tokens 7 9) + '-0.5 × storm' (tokens 7 9) sha256:1a2b3c4d… layer 20, " in line
    assert "strength 0.55 for p95 KL 0.5, blend" in line
    message = comparison_pb2.Comparison(arm="a", kl_per_token=[0.25], kl_mean=0.25, kl_p95=0.375)
    arm = decode.arm_result(message, decode.generation(make.response(receipts=[receipt_of(use, strength=0.55)])))
    lines = comparison_lines(arm, scored=True)
    asked = "asked for: p95 0.5 for ocean + -0.5 × storm"
    assert f"KL(plain‖steered) mean 0.25, p95 0.375 nats per token; {asked}" in lines
    # Of what was asked for otherwise, nothing is said.
    plain = decode.arm_result(message, decode.generation(make.response()))
    assert "asked" not in " ".join(comparison_lines(plain, scored=True))
