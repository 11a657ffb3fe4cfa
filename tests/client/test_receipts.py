from decimal import Decimal
from fractions import Fraction
from math import inf, nan, nextafter

import pytest
from steer_client import ALL_POSITIONS, OperatorUse, Positions, SteeringNotAppliedError
from steering.v1 import steering_pb2 as sp
from steering.v1 import text_pb2

# Every choice made, every choice left open, and a plan that is to change nothing.
SET = OperatorUse("golden-gate", 0.4, "substitute", 0.5, ALL_POSITIONS, "contrast", "anchor")
OPEN = OperatorUse("golden-gate")
ZERO = OperatorUse("golden-gate", 0.0)
# In a text with a prompt of 6 tokens, of which 2 more were fed to the model.
FIRST, LATE = (OperatorUse("golden-gate", 0.4, positions=Positions.parse(text)) for text in ("first", "generated"))
BEHIND = OperatorUse("golden-gate", 0.4, positions=Positions.parse("8.."))
ONE = {"prompt_tokens_steered": 1, "generated_tokens_steered": 0}

IDLE = {"prompt_tokens_steered": 0, "generated_tokens_steered": 0, "mean_dose": 0, "max_dose": 0}


def cached(steered, kept):
    """What a receipt says of the prompt's tokens where the prefix cache held some."""
    return {"prompt_tokens_steered": steered, "prompt_tokens_cached": kept}


FORGED = {
    "another version": (
        OperatorUse("golden-gate", 0.4, "substitute", 0.5, ALL_POSITIONS, "contrast", "anchor", digest="sha256:0"),
        {"digest": "sha256:1"},
        "says digest sha256:1, asked for was sha256:0",
    ),
    "another strength": (SET, {"strength": 0.3}, "says strength 0.3, asked for was 0.4"),
    "the next double": (SET, {"strength": nextafter(0.4, 1)}, r"says strength 0\.40{10,}\d+, asked for was 0\.4$"),
    "the other sign": (SET, {"strength": -0.4}, "says strength -0.4, asked for was 0.4"),
    "strength nan": (SET, {"strength": nan}, "says strength nan, asked for was 0.4"),
    "strength 0 instead": (SET, {"strength": 0} | IDLE, "says strength 0.0, asked for was 0.4"),
    "a strength instead of 0": (ZERO, {"strength": 0.55}, "says strength 0.55, asked for was 0.0"),
    "another rule": (SET, {"rule": sp.RULE_CUMULATIVE}, "says rule cumulative, asked for was substitute"),
    "another blend": (SET, {"blend": 0}, "says blend 0.0, asked for was 0.5"),
    "another anchor": (SET, {"anchor": sp.ANCHOR_CONCEPT}, "says anchor concept, asked for was contrast"),
    "the operator at the first token": (
        SET,
        {"first_token": sp.FIRST_TOKEN_OPERATOR},
        "says first_token operator, asked for was anchor",
    ),
    "blend recommended, but set": (SET, {"defaulted": ["blend"]}, "says that blend took .* unset was nothing"),
    "rule set, but left open": (
        OPEN,
        {"defaulted": ["strength", "blend"]},
        "says that strength, blend took .* unset was strength, rule, blend, positions",
    ),
    "nothing recommended": (OPEN, {"defaulted": []}, "says that nothing took a recommended value"),
    "recommended twice": (
        OPEN,
        {"defaulted": ["strength", "rule", "blend", "blend", "positions", "anchor", "first_token"]},
        "says that .*blend, blend, positions, anchor, first_token took",
    ),
    "something else recommended": (
        OPEN,
        {"defaulted": ["strength", "rule", "blend", "layer", "anchor", "first_token"]},
        "says that .*layer, anchor, first_token took",
    ),
    "one prompt token less": (SET, {"prompt_tokens_steered": 5}, r"says 5 prompt \+ 2 .* were 6 \+ 2"),
    "one prompt token more": (OPEN, {"prompt_tokens_steered": 7}, r"says 7 prompt \+ 2 .* were 6 \+ 2"),
    "one cached token less": (SET, cached(1, 4), r"says 1 prompt \(4 more cached\) \+ 2 .* were 6 \+ 2"),
    "one cached token more": (OPEN, cached(1, 6), r"says 1 prompt \(6 more cached\) \+ 2 .* were 6 \+ 2"),
    "a cached token beside a whole prompt": (SET, cached(6, 1), r"says 6 prompt \(1 more cached\) .* were 6 \+ 2"),
    "cached tokens below 0": (SET, cached(7, -1), r"says 7 prompt \(-1 more cached\) .* were 6 \+ 2"),
    "prompt tokens below 0": (SET, cached(-1, 7), r"says -1 prompt \(7 more cached\) .* were 6 \+ 2"),
    "no dose beside a cached prompt": (SET, cached(0, 6) | {"mean_dose": 0, "max_dose": 0}, "says λ mean 0, max 0 "),
    "one generated token less": (SET, {"generated_tokens_steered": 1}, r"says 6 prompt \+ 1 .* were 6 \+ 2"),
    "the last token too": (OPEN, {"generated_tokens_steered": 3}, r"says 6 prompt \+ 3 .* were 6 \+ 2"),
    "no token of the prompt": (SET, {"prompt_tokens_steered": 0}, r"says 0 prompt \+ 2 .* were 6 \+ 2"),
    "nothing at all": (OPEN, IDLE, r"says 0 prompt \+ 0 generated tokens steered at λ 0.55, .* were 6 \+ 2"),
    "dose zero": (SET, {"mean_dose": 0, "max_dose": 0}, "says λ mean 0, max 0 measured at λ .*, expected was 0.4 but"),
    "mean dose zero": (SET, {"mean_dose": 0}, "says λ mean 0, max 0.4 "),
    "a negative dose": (SET, {"mean_dose": -0.1}, "says λ mean -0.2, max 0.4 "),
    "mean dose nan": (SET, {"mean_dose": nan}, "says λ mean nan, max 0.4 "),
    "max dose nan": (OPEN, {"max_dose": nan}, "says λ mean 0.55, max nan"),
    "max dose inf": (SET, {"max_dose": inf}, "says λ mean 0.4, max inf"),
    "both doses inf": (SET, {"mean_dose": inf, "max_dose": inf}, "says λ mean inf, max inf"),
    "mean above max": (SET, {"mean_dose": 0.3}, "says λ mean 0.6, max 0.4 "),
    "a dose above its bound": (
        SET,
        {"max_dose": 0.23},
        "says λ mean 0.4, max 0.46 .* expected was 0.4 but for rounding$",
    ),
    "one hundredth of the dose": (SET, {"mean_dose": 0.002, "max_dose": 0.002}, "says λ mean 0.004, max 0.004 "),
    "nine tenths of the dose": (SET, {"mean_dose": 0.18, "max_dose": 0.18}, "says λ mean 0.36, .* was 0.4 but for"),
    "no direction checked": (
        SET,
        {"positions_checked": 0, "worst_cosine": None},
        "says that 0 directions were checked, with cosine None; expected were 1 to 8, with a cosine of 0.9995 to 1",
    ),
    "more directions than tokens": (FIRST, ONE | {"positions_checked": 2}, "says that 2 directions .* were 1 to 1, "),
    "directions below 0": (SET, {"positions_checked": -1}, "says that -1 directions were checked"),
    "no cosine": (SET, {"worst_cosine": None}, "says that 1 directions were checked, with cosine None"),
    "another direction": (SET, {"worst_cosine": 0.9}, "says that 1 directions were checked, with cosine 0.9; "),
    "the opposite direction": (SET, {"worst_cosine": -1}, "says that 1 directions were checked, with cosine -1.0; "),
    "cosine nan": (SET, {"worst_cosine": nan}, "says that 1 directions were checked, with cosine nan; "),
    "cosine above 1": (SET, {"worst_cosine": 1.1}, "says that 1 directions were checked, with cosine 1.1; "),
    "a direction at 0": (ZERO, {"positions_checked": 1, "worst_cosine": 1}, "says that 1 directions .* were none$"),
    "no bound": (SET, {"dose_bound": 0}, "says that λ adds up to 0 at layer 20, the strengths there give 0.4$"),
    "a higher bound": (
        SET,
        {"dose_bound": 0.3},
        "says that λ adds up to 0.6 at layer 20, .* there give 0.4$",
    ),
    "bound nan": (OPEN, {"dose_bound": nan}, "says that λ adds up to nan at layer 20, the strengths there give 0.55$"),
    "a bound at 0": (ZERO, {"dose_bound": 0.2}, "says that λ adds up to 0.4 at layer 20, the strengths there give 0$"),
    "a prompt steered at 0": (ZERO, {"prompt_tokens_steered": 6}, r"says 6 prompt \+ 0 .* λ 0, expected were 0 \+ 0"),
    "a token steered at 0": (ZERO, {"generated_tokens_steered": 1}, r"says 0 prompt \+ 1 .* expected were 0 \+ 0"),
    "a cached token at 0": (ZERO, cached(0, 6), r"says 0 prompt \(6 more cached\) \+ 0 .* expected were 0 \+ 0"),
    "a mean dose at 0": (ZERO, {"mean_dose": 0.1}, "says λ mean 0.2, max 0 measured at λ .*, expected was 0$"),
    "another range": (
        FIRST,
        ONE | {"positions": sp.Positions(end=2)},
        r"says positions \.\.2, asked for was first",
    ),
    "every position": (FIRST, {"positions": None}, "says positions all, asked for was first"),
    "positions recommended, but set": (
        FIRST,
        ONE | {"defaulted": ["rule", "blend", "positions", "anchor", "first_token"]},
        "says that rule, blend, positions, anchor, first_token took .* unset was rule, blend, anchor",
    ),
    "a whole prompt for its first token": (
        FIRST,
        {"generated_tokens_steered": 0},
        r"says 6 prompt \+ 0 .* were 1 \+ 0",
    ),
    "a generated token behind the first": (FIRST, ONE | {"generated_tokens_steered": 1}, r"says 1 .* were 1 \+ 0"),
    "the first token both steered and cached": (FIRST, ONE | cached(1, 1), r"says 1 prompt \(1 more cached\)"),
    "a prompt for what was generated": (LATE, {}, r"says 6 prompt \+ 2 .* were 0 \+ 2"),
    "a generated token less": (LATE, {"prompt_tokens_steered": 0, "generated_tokens_steered": 1}, r"says 0 .* 0 \+ 2"),
    "a dose where no token was measured": (
        FIRST,
        ONE | cached(0, 1),
        r"says λ mean 0\.4, max 0\.4 .* expected was 0$",
    ),
    "a max dose at 0": (ZERO, {"max_dose": nan}, "says λ mean 0, max nan measured at λ 0, expected was 0$"),
}

SETTINGS_FORGED = [
    name for name, (_, _, says) in FORGED.items() if "asked for" in says or "took" in says or "λ adds up to" in says
]

TRUE = {
    "all set": (SET, {}),
    "all left open": (OPEN, {}),
    "a strength below 0": (OperatorUse("golden-gate", -0.4), {}),
    "strength 0": (ZERO, {}),
    "strength -0": (OperatorUse("golden-gate", -0.0), {}),
    "recommended strength 0": (OPEN, {"strength": 0, "dose_bound": 0} | IDLE),
    "a strength of whole numbers": (OperatorUse("golden-gate", 1, blend=0), {}),
    "decimals and fractions": (OperatorUse("golden-gate", Decimal("0.1"), blend=Fraction(1, 3)), {}),
    "defaulted in another order": (
        OPEN,
        {"defaulted": ["first_token", "rule", "positions", "blend", "anchor", "strength"]},
    ),
    "one cached token": (SET, cached(5, 1)),
    "all of the prompt but its last token cached": (OPEN, cached(1, 5)),
    "the first token": (FIRST, ONE),
    "the first token cached": (FIRST, IDLE | cached(0, 1)),
    "what was generated": (LATE, {"prompt_tokens_steered": 0}),
    "recommended positions": (OPEN, ONE | {"positions": sp.Positions(end=1)}),
    "the same dose everywhere": (SET, {"mean_dose": 0.2}),
    "a dose rounded up in bfloat16": (SET, {"max_dose": 0.205}),
    "a dose rounded down in bfloat16": (SET, {"mean_dose": 0.195}),
    "every direction checked": (SET, {"positions_checked": 8, "worst_cosine": 1}),
}

NO_TOKEN = {"text": "", "token_ids": [], "usage": text_pb2.Usage(prompt_tokens=6, completion_tokens=0)}


@pytest.fixture
def answer(fake, make):
    """Has the server answer a request for `use` with one receipt, true but for `changes`."""

    def script(use, changes, **response):
        receipt = make.receipt(make.sent(use), **changes)
        fake.steered = make.response(receipts=[receipt], **response)
        return fake.target

    return script


def text_of(result):
    """The steered text, be it a Generation or an arm of an ABResult."""
    return result.steered["steered"].generation if hasattr(result, "steered") else result


@pytest.mark.parametrize("ended", ["EOS", "STOP_STRING", "STOP_TOKEN", "MAX_TOKENS", "CONTEXT_LIMIT"])
def test_a_text_that_ended_before_the_first_of_its_positions_is_refused(answer, any_call, ended):
    reason = text_pb2.FinishReason.Value(f"FINISH_REASON_{ended}")
    with pytest.raises(
        SteeringNotAppliedError, match=r"golden-gate: the text ended before .* positions 8\.\.: nothing"
    ):
        any_call(answer(BEHIND, IDLE, finish_reason=reason), operators=[BEHIND])


@pytest.mark.parametrize("ended", ["TIME_LIMIT", "CANCELLED"])
def test_a_text_that_was_interrupted_before_the_first_of_its_positions_is_a_result(answer, any_call, ended):
    reason = text_pb2.FinishReason.Value(f"FINISH_REASON_{ended}")
    (receipt,) = text_of(any_call(answer(BEHIND, IDLE, finish_reason=reason), operators=[BEHIND])).receipts
    assert (receipt.positions, receipt.generated_tokens_steered) == (BEHIND.positions, 0)


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_receipt_is_refused_by_every_call(answer, any_call, forged):
    use, changes, says = FORGED[forged]
    with pytest.raises(SteeringNotAppliedError, match=f"golden-gate: the receipt {says}") as caught:
        any_call(answer(use, changes), operators=[use])
    assert caught.value.metadata == {"request_id": "r1"}
    assert caught.value.reason == "STEERING_NOT_APPLIED"


@pytest.mark.parametrize("true", TRUE)
def test_a_true_receipt_is_taken_by_every_call(answer, any_call, true):
    use, changes = TRUE[true]
    result = any_call(answer(use, changes), operators=[use])
    assert [receipt.operator for receipt in text_of(result).receipts] == ["golden-gate"]


def test_a_text_of_one_token_has_only_its_prompt_steered(answer, any_call):
    one = {"token_ids": [11], "usage": text_pb2.Usage(prompt_tokens=6, completion_tokens=1)}
    result = any_call(answer(SET, {"generated_tokens_steered": 0}, **one), operators=[SET])
    assert text_of(result).receipts[0].prompt_tokens_steered == 6


def test_a_text_without_tokens_owes_no_measurement(answer, any_call):
    assert text_of(any_call(answer(SET, IDLE, **NO_TOKEN), operators=[SET])).text == ""


@pytest.mark.parametrize("forged", SETTINGS_FORGED)
def test_a_text_without_tokens_owes_its_settings(answer, generate, forged):
    use, changes, says = FORGED[forged]
    with pytest.raises(SteeringNotAppliedError, match=says):
        generate(answer(use, IDLE | changes, **NO_TOKEN), operators=[use])


@pytest.mark.parametrize("left", [{"token_ids": [11]}, {"text": "one two"}], ids=["token ids", "text"])
def test_a_text_counted_as_no_token_owes_its_measurement(answer, any_call, left):
    with pytest.raises(SteeringNotAppliedError, match=r"golden-gate: the receipt says 0 prompt \+ 0 .* were 6 \+ 0"):
        any_call(answer(SET, IDLE, **(NO_TOKEN | left)), operators=[SET])


def test_a_usage_below_the_tokens_that_came_does_not_lower_what_is_owed(answer, any_call):
    usage = text_pb2.Usage(prompt_tokens=6, completion_tokens=1)
    with pytest.raises(SteeringNotAppliedError, match=r"says 6 prompt \+ 0 .* were 6 \+ 2"):
        any_call(answer(SET, {"generated_tokens_steered": 0}, usage=usage), operators=[SET])


def test_operators_at_one_layer_share_a_bound_and_those_at_another_have_their_own(fake, make, any_call):
    uses = [OperatorUse("a", 0.4), OperatorUse("b", -0.6), OperatorUse("c", 0.2), OperatorUse("d", 0.0)]
    sent = [make.sent(use) for use in uses]

    def answer(bounds):
        places = zip(sent, bounds, (20, 20, 7, 20), strict=True)
        fake.steered = make.response(
            receipts=[
                make.receipt(use, dose_bound=bound, layer=layer, **({} if use.strength == 0 else {"max_dose": bound}))
                for use, bound, layer in places
            ]
        )
        return any_call(fake.target, operators=uses)

    assert len(text_of(answer((0.5, 0.5, 0.1, 0.5))).receipts) == 4
    for place, problem in ((0, "a: .* to 0.4 at layer 20, .* give 1"), (2, "c: .* to 0.4 at layer 7, .* give 0.2")):
        bounds = [0.5, 0.5, 0.1, 0.5]
        bounds[place] = 0.2
        with pytest.raises(SteeringNotAppliedError, match=problem):
            answer(bounds)


def test_the_operator_whose_receipt_is_forged_is_named(fake, make, any_call):
    uses = [OperatorUse("golden-gate"), OperatorUse("baseball", 0.2)]
    fake.steered = make.response(operators=["golden-gate", sp.OperatorUse(name="baseball", strength=0.3)])
    with pytest.raises(SteeringNotAppliedError, match=r"asked: baseball: the receipt says strength 0\.3"):
        any_call(fake.target, operators=uses)


def test_a_missing_receipt_is_never_overlooked(fake, make, any_call):
    fake.steered = make.response(operators=["golden-gate"])
    uses = [OperatorUse("golden-gate"), OperatorUse("baseball")]
    with pytest.raises(SteeringNotAppliedError, match="golden-gate, baseball") as caught:
        any_call(fake.target, operators=uses)
    assert caught.value.metadata == {"request_id": "r1"}


def test_receipts_in_another_order_are_no_proof(fake, make, any_call):
    fake.steered = make.response(operators=["baseball", "golden-gate"])
    with pytest.raises(SteeringNotAppliedError, match="receipts are for baseball, golden-gate"):
        any_call(fake.target, operators=[OperatorUse("golden-gate"), OperatorUse("baseball")])


def test_a_receipt_of_another_operator_is_no_proof(fake, make, any_call):
    fake.steered = make.response(operators=["baseball"])
    with pytest.raises(SteeringNotAppliedError, match="receipts are for baseball"):
        any_call(fake.target, operators=[OperatorUse("golden-gate")])


def test_a_plain_text_that_comes_back_steered_is_refused(fake, make, any_call):
    fake.response = make.response(operators=["golden-gate"])
    with pytest.raises(SteeringNotAppliedError, match="asked for no operator"):
        any_call(fake.target)


def test_every_arm_of_a_comparison_owes_its_receipts(fake, make, compare):
    arms = {"weak": [OperatorUse("golden-gate", 0.1)], "strong": [OperatorUse("golden-gate", 0.9)]}
    weak = make.response("one more", operators=[sp.OperatorUse(name="golden-gate", strength=0.1)])
    fake.events = make.comparison(make.response(), {"weak": weak, "strong": weak})
    with pytest.raises(SteeringNotAppliedError, match=r"says strength 0\.1, asked for was 0\.9"):
        compare(fake.target, arms=arms)
