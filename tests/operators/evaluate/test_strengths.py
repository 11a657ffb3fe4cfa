"""The search for the strength at a budget, on curves that are known."""

import math

import pytest

from operators.evaluate.protocol import GRID, MOST, Budget
from operators.evaluate.strengths import Trial, closest, next_strengths

BUDGETS = (Budget("p95", 0.5), Budget("p95", 2.0), Budget("mean", 0.25))


def search(curve, budgets=BUDGETS, first=GRID):
    tried, rounds = [], 0
    while strengths := next_strengths(tried, budgets, first):
        tried += [Trial(strength, *curve(strength)) for strength in strengths]
        rounds += 1
        assert rounds < 20
    return tried


@pytest.mark.parametrize("scale", [0.02, 1.0, 300.0])
def test_every_budget_is_met_on_a_smooth_curve(scale):
    tried = search(lambda s: (scale * s**1.7, scale * s**1.7 / 4))
    for budget in BUDGETS:
        trial, reached = closest(tried, budget)
        assert reached == (abs(math.log(trial.kl(budget) / budget.nats)) <= math.log(1.3))
        # Where KL at the largest strength is too small, no strength reaches.
        assert reached or scale == 0.02


def test_a_form_that_never_gets_that_far_says_so():
    tried = search(lambda s: (0.01, 0.002))
    assert not closest(tried, BUDGETS[0])[1]
    assert max(trial.strength for trial in tried) <= MOST


def test_a_curve_with_a_step_ends():
    tried = search(lambda s: (0.01, 0.01) if s < 0.2 else (9.0, 3.0))
    assert len(tried) <= len(GRID) + 3 * len(BUDGETS) + len(BUDGETS)
    assert not closest(tried, BUDGETS[0])[1]


def test_a_known_strength_is_where_another_search_begins():
    assert next_strengths([], BUDGETS, [0.2, 0.4]) == [0.2, 0.4]
    assert next_strengths([Trial(0.2, 0.5, 0.25)], BUDGETS[:1], [0.2]) == []
