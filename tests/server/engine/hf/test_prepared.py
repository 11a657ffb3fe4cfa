"""Operators on the device that steers, and strengths that its numbers cannot tell from nothing."""

import pytest
import torch

from operators.core.apply import prepare
from steer_server.engine.hf import engine as hf
from steer_server.engine.hf import operator_cache
from steer_server.engine.hf.operator_cache import PreparedOperatorCache
from steer_server.engine.hf.steering import RowSteering
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import DecodeJob, Row, SamplingParams

_CPU = torch.device("cpu")
_DTYPES = [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float64, "float64")]


def _prepared(budget=1 << 30):
    return PreparedOperatorCache(_CPU, budget=budget)


@pytest.fixture
def prepared_digests(monkeypatch):
    """The operators that were moved to the device, in order."""
    moved = []
    prepare = operator_cache.prepare

    def watched(artifact, device):
        moved.append(artifact.digest)
        return prepare(artifact, device)

    monkeypatch.setattr(operator_cache, "prepare", watched)
    return moved


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "name"), _DTYPES)
def test_a_strength_below_the_resolution_of_the_dtype_is_an_error(artifact, plan_of, dtype, name, sign):
    eps = torch.finfo(dtype).eps
    with pytest.raises(SteeringNotAppliedError, match="rounding") as caught:
        RowSteering(plan_of((artifact, sign * eps * 0.99)), _prepared(), dtype, prompt_tokens=1)
    for part in ("operator-0", name, f"{eps:.1g}"):
        assert part in str(caught.value)
    assert RowSteering(plan_of((artifact, sign * eps)), _prepared(), dtype, prompt_tokens=1).layers == {2}


def test_a_strength_of_zero_is_no_strength_that_is_lost(artifact, plan_of):
    assert RowSteering(plan_of((artifact, 0.0)), _prepared(), torch.bfloat16, prompt_tokens=1).layers == frozenset()


def test_a_strong_operator_does_not_hide_that_another_at_its_layer_is_lost(
    tiny, artifact, other_artifact, plan_of, decode
):
    coarse = tiny("llama", dtype="bfloat16")
    with pytest.raises(SteeringNotAppliedError, match="rounding") as caught:
        decode(coarse, plan_of((artifact, 0.5), (other_artifact, 1e-12)))
    assert "operator-1: strength 1e-12" in str(caught.value)
    assert "operator-0" not in str(caught.value)
    ids, _, _ = decode(coarse, plan_of((artifact, 0.5), (other_artifact, 0.5)))
    assert len(ids[0]) == 6


def test_a_strength_that_is_lost_in_rounding_is_an_error(tiny, artifact, plan_of, decode):
    coarse = tiny("llama", dtype="bfloat16")
    with pytest.raises(SteeringNotAppliedError, match="rounding") as caught:
        decode(coarse, plan_of((artifact, 1e-9)))
    assert "operator-0: strength 1e-09" in str(caught.value)
    ids, _, _ = decode(coarse, plan_of((artifact, 0.5)))
    assert len(ids[0]) == 6


def test_an_operator_is_prepared_once_and_kept(artifact, plan_of, prepared_digests):
    prepared = _prepared()
    (use,) = plan_of((artifact, 0.5)).applications
    first = prepared.get(use)
    prepared.trim()
    assert prepared.get(use) is first
    assert (len(prepared), prepared_digests) == (1, [artifact.digest])


def test_the_least_recently_used_operator_goes_first_and_comes_back_on_demand(
    artifact, other_artifact, remake, plan_of, prepared_digests
):
    third = remake(artifact, concept="a third")
    uses = plan_of((artifact, 0.5), (other_artifact, 0.5), (third, 0.5)).applications
    sizes = [prepare(use.artifact, torch.device("cpu")).nbytes for use in uses]
    prepared = _prepared(budget=sizes[0] + sizes[2])
    kept = [prepared.get(use) for use in uses]
    assert prepared.get(uses[0]) is kept[0]
    assert len(prepared) == 3
    prepared.trim()
    assert len(prepared) == 2
    # The first was used again, so the second was the one to go.
    assert prepared.get(uses[0]) is kept[0]
    assert prepared.get(uses[2]) is kept[2]
    assert len(prepared_digests) == 3
    again = prepared.get(uses[1])
    assert torch.equal(again.factors, kept[1].factors)
    assert prepared_digests[3:] == [other_artifact.digest]


@pytest.mark.parametrize("spare", [0, -1])
def test_the_budget_is_in_bytes_and_may_be_used_up(artifact, plan_of, spare):
    (use,) = plan_of((artifact, 0.5)).applications
    prepared = _prepared(budget=prepare(use.artifact, torch.device("cpu")).nbytes + spare)
    prepared.get(use)
    prepared.trim()
    assert len(prepared) == (1 if spare == 0 else 0)


async def test_the_engine_keeps_no_more_than_its_budget(llama, artifact, other_artifact, plan_of, prompt_ids):
    budget = prepare(artifact, torch.device("cpu")).nbytes
    engine = hf.HFEngine(llama, max_queue=2, operator_memory=budget)
    plan = plan_of((artifact, 0.5), (other_artifact, 0.5))
    job = DecodeJob.of(prompt_ids, SamplingParams(max_tokens=3, ignore_eos=True), (Row(plan),))
    try:
        for _ in range(2):
            texts = [event async for event in engine.submit(job)]
            assert texts[-1].receipts[1].generated_tokens_steered == 2
            assert len(engine._operators) <= 1
    finally:
        await engine.close()
