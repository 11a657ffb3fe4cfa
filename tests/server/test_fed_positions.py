"""What a request may ask for, and what its receipts must say, of the positions that the model is fed."""

from dataclasses import replace

import pytest

from operators.core.apply import Setting
from operators.core.positions import Positions
from steer_server.engine.dose import DoseStatistics
from steer_server.engine.receipts import make_receipts
from steer_server.errors import InvalidRequestError, SteeringNotAppliedError
from steer_server.fed_positions import check_reachable, check_receipts
from steer_server.types import Application, FinishReason, SteeringPlan

PROMPT = 6


@pytest.fixture
def plan_at(artifact):
    """``plan_at("first", ..., strength=0.5)``: the operator once for each of the positions."""

    def make(*positions, strength=0.5):
        return SteeringPlan(
            tuple(
                Application("golden", artifact, Setting(strength, "cumulative", 0.0, Positions.parse(text)), ())
                for text in positions
            )
        )

    return make


def _check_reachable(plan, max_tokens, context_length=100):
    check_reachable(plan, "operators", prompt_tokens=PROMPT, max_tokens=max_tokens, context_length=context_length)


@pytest.mark.parametrize(
    ("positions", "fewest"),
    [("all", 1), ("first", 1), ("prompt", 1), ("prompt:5..", 1), ("5..", 1), ("6..", 2), ("generated", 2),
     ("generated:3..", 5), ("9..12", 5)],
)  # fmt: skip
def test_positions_are_accepted_from_the_first_text_on_that_can_have_one_of_them(plan_at, positions, fewest):
    _check_reachable(plan_at(positions), fewest)
    if fewest > 1:
        with pytest.raises(InvalidRequestError) as caught:
            _check_reachable(plan_at("all", positions), fewest - 1)
        assert caught.value.field == "operators[1].positions"
        # The context bounds a text like max_tokens.
        with pytest.raises(InvalidRequestError):
            _check_reachable(plan_at(positions), 1 << 30, context_length=PROMPT + fewest - 1)
        _check_reachable(plan_at(positions), 1 << 30, context_length=PROMPT + fewest)


@pytest.mark.parametrize("positions", ["prompt:6..", "prompt:7..9"])
def test_no_text_has_positions_of_the_prompt_behind_its_end(plan_at, positions):
    with pytest.raises(InvalidRequestError, match=rf"is {positions}, which begins .*; the prompt has 6 tokens$"):
        _check_reachable(plan_at(positions), 1 << 30)


def test_a_request_without_operators_has_nothing_to_reach():
    _check_reachable(None, 1)


def _check(plan, counts, generated, reason=FinishReason.MAX_TOKENS, looked_at=1):
    """Of (prompt, generated, cached) tokens of each operator, ``looked_at`` of which had their direction checked."""
    measured = make_receipts(
        plan, [DoseStatistics(prompt, later, cached, 0.2 * (prompt + later), 0.2) for prompt, later, cached in counts]
    )
    receipts = tuple(replace(receipt, positions_checked=looked_at) for receipt in measured)
    check_receipts(plan, receipts, prompt_tokens=PROMPT, generated_tokens=generated, reason=reason)


@pytest.mark.parametrize(
    ("positions", "due"),
    [("all", (6, 3)), ("first", (1, 0)), ("prompt", (6, 0)), ("generated", (0, 3)), ("4..8", (2, 2)),
     ("generated:1..9", (0, 2)), ("prompt:4..", (2, 0)), ("..1000", (6, 3))],
)  # fmt: skip
def test_receipts_are_held_against_the_positions_that_were_fed(plan_at, positions, due):
    plan = plan_at("all", positions)
    # Four tokens were generated, of which the last was not fed.
    _check(plan, [(6, 3, 0), (*due, 0)], 4)
    if due[0]:
        _check(plan, [(6, 3, 0), (due[0] - 1, due[1], 1)], 4)
    for wrong in ((due[0] + 1, due[1], 0), (due[0], due[1] + 1, 0), (due[0], due[1], 1), (due[0], due[1] - 1, 0)):
        with pytest.raises(SteeringNotAppliedError, match=rf"golden: .* its positions \({positions}\)"):
            _check(plan, [(6, 3, 0), wrong], 4)


def test_a_text_whose_directions_nobody_looked_at_is_an_error(plan_at):
    with pytest.raises(SteeringNotAppliedError, match="golden: at none of its positions was the direction looked at"):
        _check(plan_at("all"), [(6, 3, 0)], 4, looked_at=0)
    # Nothing was computed that could be looked at.
    _check(plan_at("prompt"), [(0, 0, 6)], 4, looked_at=0)


def test_receipts_of_other_positions_are_not_those_of_the_plan(plan_at):
    plan, other = plan_at("first"), plan_at("..2")
    receipts = make_receipts(other, [DoseStatistics(1, 0, 0, 0.2, 0.2)])
    with pytest.raises(SteeringNotAppliedError, match="not those of the plan"):
        check_receipts(plan, receipts, prompt_tokens=PROMPT, generated_tokens=4, reason=FinishReason.EOS)
    check_receipts(
        plan,
        (replace(receipts[0], positions=Positions(end=1), positions_checked=1),),
        prompt_tokens=PROMPT,
        generated_tokens=4,
        reason=FinishReason.EOS,
    )


@pytest.mark.parametrize("reason", FinishReason)
def test_a_text_without_one_of_the_positions_is_an_error_unless_it_was_interrupted(plan_at, reason):
    plan = plan_at("generated:2..")
    if reason in (FinishReason.TIME_LIMIT, FinishReason.CANCELLED):
        _check(plan, [(0, 0, 0)], 3, reason)
    else:
        with pytest.raises(SteeringNotAppliedError, match=rf"begin at 8; the text ended \({reason}\) when .* fed 8"):
            _check(plan, [(0, 0, 0)], 3, reason)
    # One more token, and one of the positions was fed.
    _check(plan, [(0, 1, 0)], 4, reason)
    _check(plan_at("generated:2..", strength=0.0), [(0, 0, 0)], 3, reason)


def test_a_text_of_one_token_has_fed_nothing_that_was_generated(plan_at):
    with pytest.raises(SteeringNotAppliedError, match="nothing was steered"):
        _check(plan_at("generated"), [(0, 0, 0)], 1, FinishReason.EOS)


@pytest.mark.parametrize("reason", FinishReason)
def test_a_text_without_a_token_is_an_error_unless_it_was_interrupted(plan_at, reason):
    if reason in (FinishReason.TIME_LIMIT, FinishReason.CANCELLED):
        _check(plan_at("all"), [(0, 0, 0)], 0, reason)
    else:
        with pytest.raises(SteeringNotAppliedError, match=rf"ended \({reason}\) without a token"):
            _check(plan_at("all"), [(0, 0, 0)], 0, reason)
    _check(plan_at("all", strength=0.0), [(0, 0, 0)], 0, reason)
