"""The dose of operators together: bounded before a request starts, measured while it runs."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from operators.core import hooks
from operators.core.apply import Setting
from operators.core.header import Recommended
from operators.core.positions import Positions
from operators.core.store import Store
from steer_server.engine.receipts import empty_receipts
from steer_server.errors import DoseTooHighError, SteeringNotAppliedError
from steer_server.registry import Registry
from steer_server.types import Application, OperatorUse, SteeringPlan

_ROUNDING = {"float32": 1e-5, "bfloat16": 0.02}
_SIGNED = st.floats(-1.5, 1.5).filter(lambda strength: abs(strength) > 0.05)
_PROPERTY = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def registry(tmp_path, artifact, other_artifact, low_artifact, remake, model_info):
    """Operators ``a``, ``b`` and ``low`` at layer 2, ``high`` at layer 3 and ``loud``, recommending strength 3."""
    Store(tmp_path).save("a", artifact)
    Store(tmp_path).save("b", other_artifact)
    Store(tmp_path).save("low", low_artifact)
    Store(tmp_path).save("high", remake(artifact, layer=3, injection_layer=3))
    Store(tmp_path).save("loud", remake(artifact, recommended=Recommended(strength=3.0)))
    return lambda max_dose=1.0: Registry(Store(tmp_path), model_info, max_bytes=1 << 20, max_dose=max_dose)


def _uses(**strengths):
    return tuple(OperatorUse(name, strength) for name, strength in strengths.items())


def test_doses_at_one_layer_that_pass_the_limit_are_refused_by_name(registry):
    with pytest.raises(DoseTooHighError) as caught:
        registry().plan(_uses(a=1.8, b=-0.9, high=0.5), field="arms[1].operators")
    assert str(caught.value) == (
        "arms[1].operators: the strengths at layer 2 add up to 2.7; at most 2 is accepted (a 1.8, b 0.9): their "
        "sizes count, and the bound is twice the server's --max-dose 1"
    )
    error = caught.value
    assert (error.field, error.layer, error.dose, error.max_dose) == ("arms[1].operators", 2, 1.35, 1.0)


def test_one_operator_that_passes_the_limit_is_refused_at_its_strength(registry):
    with pytest.raises(DoseTooHighError, match=r"add up to 3; .* \(high 3\)") as caught:
        registry().plan(_uses(a=2.0, high=-3.0))
    assert caught.value.field == "operators[1].strength"


def test_a_recommended_strength_that_passes_the_limit_is_named_as_such(registry):
    with pytest.raises(DoseTooHighError, match=r"\(loud 3, the recommended strength\)"):
        registry().plan((OperatorUse("loud"),))


def test_each_layer_has_the_whole_limit(registry):
    assert registry().plan(_uses(a=-1.2, b=0.8, high=2.0)) is not None
    # Three tenths are a little more than 0.3, in binary.
    assert sum([0.1] * 3) > 0.3
    assert registry(0.3).plan((OperatorUse("a", 0.2),) * 3) is not None


def test_the_limit_is_the_servers_to_set(registry):
    assert registry(4.0).plan(_uses(a=8.0)) is not None
    with pytest.raises(DoseTooHighError, match=r"add up to 0\.51; at most 0\.5 is accepted"):
        registry(0.25).plan(_uses(a=0.51))


@pytest.mark.parametrize("strength", [1e300, -1.7e308])
def test_a_strength_without_measure_is_refused(registry, strength):
    with pytest.raises(DoseTooHighError):
        registry().plan((OperatorUse("a", strength),) * 16)


def test_as_many_operators_as_are_accepted_are_refused_in_a_message_that_begins_with_the_limit(registry):
    with pytest.raises(DoseTooHighError, match="at most 2 is accepted"):
        registry().plan((OperatorUse("a", 0.5),) * 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@_PROPERTY
@given(data=st.data())
def test_the_measured_dose_never_passes_the_sum_of_its_strengths(
    dtype, data, tiny, artifact, other_artifact, low_artifact, remake, decode
):
    operators = (artifact, other_artifact, low_artifact, remake(low_artifact, layer=3, injection_layer=3))
    chosen = data.draw(st.lists(st.sampled_from(operators), min_size=1, max_size=4, unique_by=id))
    plan = SteeringPlan(
        tuple(
            Application(
                f"operator-{place}",
                operator,
                Setting(
                    data.draw(_SIGNED),
                    data.draw(st.sampled_from(["cumulative", "substitute"])),
                    data.draw(st.sampled_from([0.0, 0.4])),
                ),
                (),
            )
            for place, operator in enumerate(chosen)
        )
    )
    _, (receipts,), _ = decode(tiny("llama", dtype=dtype), plan, max_tokens=3)
    for use, receipt in zip(plan.applications, receipts, strict=True):
        together = [other.setting.strength for other in plan.applications if other.layer == use.layer]
        assert receipt.dose_bound == pytest.approx(sum(map(abs, together)) / 2, rel=1e-12)
        assert 0 < receipt.mean_dose <= receipt.max_dose <= receipt.dose_bound + _ROUNDING[dtype]
        if len(together) == 1:
            assert receipt.max_dose == pytest.approx(receipt.dose_bound, abs=_ROUNDING[dtype])


@_PROPERTY
@given(strengths=st.lists(_SIGNED, min_size=2, max_size=5))
def test_the_dose_of_equal_directions_is_that_of_the_sum_of_their_strengths(
    llama, artifact, plan_of, decode, strengths
):
    plan = plan_of(*((artifact, strength) for strength in strengths))
    expected = abs(sum(strengths)) / 2
    if expected < 1e-3:
        return
    _, (receipts,), _ = decode(llama, plan, max_tokens=2)
    for receipt in receipts:
        assert receipt.mean_dose == pytest.approx(expected, abs=1e-5)
        assert receipt.max_dose == pytest.approx(expected, abs=1e-5)
        assert receipt.dose_bound == pytest.approx(sum(map(abs, strengths)) / 2, rel=1e-12)


def test_layers_are_bounded_each_by_its_own_strengths(llama, artifact, low_artifact, remake, plan_of, decode):
    high = remake(artifact, layer=3, injection_layer=3)
    _, (receipts,), _ = decode(llama, plan_of((artifact, 0.5), (high, -1.2), (low_artifact, 0.3), (high, 0.0)))
    assert [receipt.dose_bound for receipt in receipts] == [0.4, 0.6, 0.4, 0.6]
    assert receipts[1].max_dose == pytest.approx(0.6, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [0.0, 0.01, 0.9, 1.1, 2.0])
def test_a_state_that_moves_by_another_dose_is_an_error(tiny, artifact, plan_of, decode, monkeypatch, dtype, factor):
    steer = hooks.steer
    monkeypatch.setattr(hooks, "steer", lambda hidden, push: steer(hidden, factor * push))
    with pytest.raises(SteeringNotAppliedError, match=r"operator-0=0\.5 at layer 2: the hidden state moved as by "):
        decode(tiny("llama", dtype=dtype), plan_of((artifact, 0.5)))


def test_rounding_to_the_models_dtype_is_no_violation(tiny, artifact, plan_of, decode):
    coarse = tiny("llama", dtype="bfloat16")
    eps = torch.finfo(torch.bfloat16).eps
    for strength in (eps, -2 * eps, 0.1, 2.0):
        _, ((receipt,),), _ = decode(coarse, plan_of((artifact, strength)), max_tokens=8)
        assert receipt.dose_bound == abs(strength) / 2


def test_a_row_that_never_reached_the_model_has_its_bound(plan_of, artifact):
    (receipt,) = empty_receipts(plan_of((artifact, -0.5)))
    assert (receipt.dose_bound, receipt.max_dose) == (0.25, 0.0)


def test_a_setting_is_calibrated_where_it_is_the_recommended_one_and_was_chosen(
    registry, tmp_path, low_artifact, remake, calibration_of
):
    header = low_artifact.header
    Store(tmp_path).save("measured", remake(low_artifact, calibration=calibration_of(header)))
    Store(tmp_path).save("chosen", remake(low_artifact, calibration=calibration_of(header, at_recommended=False)))
    curves = calibration_of(header)
    for name, chosen in (("rejected", 0), ("unfound", None)):
        calibration = curves.model_copy(update={"chosen": chosen})
        Store(tmp_path).save(name, remake(low_artifact, calibration=calibration))
    early = header.recommended.model_copy(update={"positions": Positions(end=1)})
    Store(tmp_path).save("early", remake(low_artifact, calibration=calibration_of(header), recommended=early))
    made = registry()
    strength = header.recommended.strength

    def calibrated(use):
        return made.plan((use,)).applications[0].calibrated

    assert calibrated(OperatorUse("measured"))
    assert calibrated(OperatorUse("measured", strength, header.recommended.rule, header.recommended.blend))
    # Measured at all positions.
    assert not calibrated(OperatorUse("measured", positions=Positions(end=1)))
    assert not calibrated(OperatorUse("early"))
    # Measured as well, and not what was recommended.
    assert not calibrated(OperatorUse("measured", strength / 2))
    assert not calibrated(OperatorUse("measured", blend=0.75))
    assert not calibrated(OperatorUse("chosen"))
    # It was tried, and another one was better, or all were outside the bounds.
    assert not calibrated(OperatorUse("rejected"))
    assert not calibrated(OperatorUse("unfound"))
    assert not calibrated(OperatorUse("low"))


def test_a_receipt_says_whether_its_setting_was_calibrated(llama, artifact, plan_of, decode):
    (use,) = plan_of((artifact, 0.5)).applications
    for calibrated in (True, False):
        plan = SteeringPlan((dataclasses.replace(use, calibrated=calibrated),))
        _, ((receipt,),), _ = decode(llama, plan, max_tokens=1)
        assert receipt.calibrated is calibrated
