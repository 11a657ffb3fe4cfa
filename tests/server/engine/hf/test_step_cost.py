"""What a further row adds to a step, in operations of torch: each takes the decoding thread a few microseconds."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from steer_server.engine.hf.rows import check_finite
from steer_server.errors import EngineFailedError
from steer_server.types import Row
from tests.operations import CountOperations

_STEPS = 12


def _operations(decoder):
    """Of the cheapest step behind the first two: one in which no hidden state is looked at."""
    with CountOperations() as counted:
        counts = [counted.count for _ in decoder.turns()]
    return min(end - start for start, end in pairwise(counts[2:-1]))


@pytest.mark.parametrize(
    ("kind", "most"),
    # Its logits. Its place among the pushes of all.
    [("plain", 1), ("anchor", 1), ("operator", 1)],
)
def test_a_further_row_adds_few_operations_to_a_step(kind, most, llama, artifact, plan_of, make_decoder):
    def step(rows):
        plans = [None if kind == "plain" else plan_of((artifact, 0.1 + 0.01 * row), blend=blend) for row in range(rows)]
        return _operations(make_decoder(llama, [Row(plan) for plan in plans], max_tokens=_STEPS))

    blend = {"anchor": 1.0, "operator": 0.5}.get(kind)
    assert step(6) - step(2) <= 4 * most


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 13, 32, 999])
def test_one_logit_that_is_not_finite_is_found_wherever_it_is(bad, place):
    slots = [SimpleNamespace(steering=None, state=SimpleNamespace(num_generated=0))] * 3
    logits = torch.randn(3, 2, 1000)
    check_finite(slots, logits)
    logits[2, 1, place] = bad
    with pytest.raises(EngineFailedError, match="not finite"):
        check_finite(slots, logits)
