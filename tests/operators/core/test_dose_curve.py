"""The strength that a budget of KL asks for."""

import math

import pytest
from pydantic import ValidationError

from operators.core.dose_curve import DoseCurve, DosePoint, strength_for
from operators.core.errors import SettingError

SQUARE = [(s, 30 * s**2) for s in (0.05, 0.1, 0.2, 0.4)]


def test_a_measured_dose_gives_its_strength_and_one_between_follows_the_power_law():
    assert strength_for(SQUARE, 30 * 0.1**2) == 0.1
    assert strength_for(SQUARE, 0.5) == pytest.approx(math.sqrt(0.5 / 30), rel=1e-3)


def test_more_nats_never_give_less_strength_where_kl_falls_by_chance():
    doses = [(0.05, 0.1), (0.1, 0.6), (0.15, 0.4), (0.2, 1.0)]
    found = [strength_for(doses, kl / 100) for kl in range(10, 101)]
    assert found == sorted(found)
    # The weakest strength that uses the budget up.
    assert strength_for(doses, 0.5) < 0.1


@pytest.mark.parametrize("kl", [0.07, 4.9])
def test_nothing_is_extrapolated(kl):
    with pytest.raises(SettingError, match=r"0\.075 to 4\.8 nats .* strengths 0\.05 to 0\.4") as caught:
        strength_for(SQUARE, kl)
    assert caught.value.field == "kl"


@pytest.mark.parametrize("kl", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_is_a_positive_number(kl):
    with pytest.raises(SettingError, match="kl is"):
        strength_for(SQUARE, kl)


def test_without_a_dose_a_strength_is_asked_for():
    with pytest.raises(SettingError, match="no dose was measured"):
        strength_for([], 0.5)


def test_the_points_of_a_curve_rise():
    point = DosePoint(strength=0.1, kl_p95=1, kl_mean=1, hit_rate=1, useful_rate=1)
    with pytest.raises(ValidationError, match="do not rise"):
        DoseCurve(
            words=("tea",),
            prompts=1,
            prompts_digest=f"sha256:{'1' * 64}",
            tokens=1,
            plain_hit_rate=0,
            points=(point, point),
        )
