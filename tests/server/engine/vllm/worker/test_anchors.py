"""Which anchor a batch is pushed along, and at its first token, held against one sequence at a time."""

import pytest
import torch

from steer_server.engine.vllm.worker_protocol import OperatorSetting


def _close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("anchor", ["contrast", "concept"])
@pytest.mark.parametrize("first_token", ["operator", "anchor"])
@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 7], [1, 11]], ids=str)
def test_requests_of_both_anchors_side_by_side_are_pushed_as_if_alone(batch, anchor, first_token, rule, cuts):
    how = {"anchor": anchor, "first_token": first_token}
    batch.begin("a", OperatorSetting("exact", rule, 0.6, 0.4, **how), OperatorSetting("affine", rule, -0.3, 0.0, **how))
    batch.begin("b", OperatorSetting("exact", "cumulative", 0.5, 1.0, anchor="concept"), seed=1)
    batch.begin("c", OperatorSetting("exact", rule, 0.5, 0.0, 0, 1, **how), seed=2)
    first = 0
    for count in cuts:
        pushed = batch.step(*((request, first, count) for request in "abc"))
        for request in "abc":
            due = batch.expected(request, 2)[first : first + count]
            _close(pushed.get((request, 2), torch.zeros_like(due)), due)
        first += count
    assert [batch.failure(request) for request in "abc"] == ["", "", ""]
    assert {len(each.doses) for each in batch.steering.measurement("a").layers} == {12}


def test_a_request_that_comes_back_after_its_first_token_has_its_running_sum(batch):
    batch.begin("a", OperatorSetting("exact", "cumulative", 0.6, 0.4, anchor="contrast", first_token="anchor"))
    batch.step(("a", 0, 6))
    _close(batch.step(("a", 3, 9))["a", 2], batch.expected("a", 2)[3:])
    assert batch.failure("a") == ""


def test_the_contrast_of_an_operator_without_one_fails_the_request_and_no_other(batch):
    batch.begin("bad", OperatorSetting("low", "cumulative", 0.5, 0.5, anchor="contrast"))
    batch.begin("good", OperatorSetting("exact", "cumulative", 0.5, 0.5, anchor="contrast"), seed=1)
    pushed = batch.step(("bad", 0, 12), ("good", 0, 12))
    assert "has no contrast anchor" in batch.failure("bad")
    _close(pushed["good", 2], batch.expected("good", 2))
    assert batch.failure("good") == ""
