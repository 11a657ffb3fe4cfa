"""Two distributions, held against each other by hand."""

import dataclasses
import json
import math

import pytest
import torch

from steer_server.engine.distributions import compare_positions, plain_scores, score_of
from steer_server.types import Report, Score

PLAIN = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]]).log()
ROW = torch.tensor([[0.25, 0.125, 0.5, 0.125], [0.1, 0.2, 0.3, 0.4]]).log()


def test_every_figure_is_that_of_the_distributions():
    # Logits are log-probabilities but for a constant.
    first, second = compare_positions(PLAIN + 3.0, ROW - 1.0, (2, 3), Report(top=2, words=((0,), (1, 2))))
    assert (first.plain_logprob, first.logprob) == pytest.approx((math.log(0.125), math.log(0.5)))
    assert first.kl == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(2) + 0.125 * math.log(0.25), rel=1e-5)
    assert [token for token, _ in first.gained] == [2]
    assert [token for token, _ in first.lost] == [1]
    assert (first.gained[0][1], first.lost[0][1]) == pytest.approx((math.log(0.5), math.log(0.25)))
    assert [each for mass in first.words for each in mass] == pytest.approx([0.5, 0.25, 0.375, 0.625])
    assert (second.kl, second.gained, second.lost) == (0.0, (), ())


def test_without_a_report_there_is_nothing_but_the_token():
    (first,) = compare_positions(PLAIN[:1], ROW[:1], (0,))
    assert (first.gained, first.lost, first.words) == ((), (), ())
    assert plain_scores((-1.0, -2.0)) == (Score(0.0, -1.0, -1.0), Score(0.0, -2.0, -2.0))


def test_more_than_the_vocabulary_is_all_of_it():
    (first,) = compare_positions(PLAIN[:1], ROW[:1], (0,), Report(top=20))
    assert (first.gained, first.lost) == ((), ())


def test_a_score_is_the_same_after_it_has_travelled_as_lists():
    for each in compare_positions(PLAIN, ROW, (2, 3), Report(top=2, words=((0,),))):
        assert score_of(json.loads(json.dumps(dataclasses.astuple(each)))) == each
