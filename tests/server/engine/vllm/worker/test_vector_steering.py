"""Vectors among the operators of a continuous batch."""

import pytest
import torch

from operators.core.apply import prepare
from steer_server.engine.vllm.worker.step_steering import LoadedOperator
from steer_server.engine.vllm.worker_protocol import OperatorSetting

ANCHOR = OperatorSetting("vector", "cumulative", -0.6, 1.0)


@pytest.fixture
def mixed(batch, make_rank_0):
    """The batch's operators and a vector, all at layers 2 and 3."""
    vector = LoadedOperator(prepare(make_rank_0(), torch.device("cpu")), 2)
    batch.loaded = {**batch.loaded, "vector": vector}
    batch.steering.load("vector", vector)
    return batch


def test_it_pushes_beside_other_operators_as_if_it_were_alone(mixed):
    operator = OperatorSetting("exact", "cumulative", 0.5, 0.25)
    mixed.begin("a", ANCHOR, operator, seed=1)
    mixed.begin("b", OperatorSetting("vector", "substitute", 0.3, 1.0), seed=2)
    mixed.begin("c", operator, seed=3)
    expected = {request: mixed.expected(request, 2) for request in "abc"}
    at = dict.fromkeys("abc", 0)
    for counts in ({"a": 5, "b": 1}, {"a": 1, "b": 1, "c": 1}, {"b": 7, "c": 4}, {"a": 6, "b": 3, "c": 7}):
        pushed = mixed.step(*((request, at[request], count) for request, count in counts.items()))
        for request, count in counts.items():
            wanted = expected[request][at[request] : at[request] + count]
            torch.testing.assert_close(pushed[request, 2], wanted, rtol=1e-4, atol=1e-5)
            at[request] += count
    assert [mixed.failure(request) for request in "abc"] == ["", "", ""]


def test_after_a_preemption_or_a_cached_prefix_nothing_is_computed_again(mixed):
    mixed.begin("a", ANCHOR)
    mixed.step(("a", 4, 3))
    mixed.step(("a", 9, 2))
    mixed.step(("a", 0, 12))
    assert mixed.embedded_prefixes == []
    assert mixed.failure("a") == ""


@pytest.mark.parametrize("blend", [0.0, 0.5])
def test_another_blend_fails_the_request_and_no_other(mixed, blend):
    mixed.begin("a", OperatorSetting("vector", "cumulative", 0.6, blend), seed=1)
    mixed.begin("b", ANCHOR, seed=2)
    mixed.step(("a", 0, 3), ("b", 0, 3))
    mixed.step(("a", 3, 1), ("b", 3, 1))
    assert mixed.failure("a") == f"vector is a vector: blend is {blend:g}, not 1"
    assert mixed.failure("b") == ""
