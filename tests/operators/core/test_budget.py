"""Budgets of KL, for operators and lenses."""

import pytest

from operators.core.budget import strength_within
from operators.core.dose_curve import DoseCurve, DosePoint
from operators.core.errors import SettingError
from operators.core.header import Calibration, CalibrationPoint
from operators.core.positions import ALL_POSITIONS, Positions

FIRST = Positions(end=1)


def _point(strength, kl, texts=8, **fields):
    at = {"layer": 2, "rule": "cumulative", "blend": 0.5, "hit_rate": 0.5, "perplexity_ratio": 1, "distinct_2": 1}
    return CalibrationPoint(strength=strength, kl_p95=kl, texts=texts, **{**at, **fields})


@pytest.fixture
def calibrated(make_operator):
    points = (
        _point(0.2, 9.0, texts=4),
        _point(0.2, 0.25),
        _point(0.4, 1.0),
        _point(0.4, 7.0, rule="substitute"),
        _point(0.4, 5.0, layer=1),
        _point(0.4, 0.6, anchor="contrast"),
        _point(0.4, 0.7, anchor="contrast", first_token="anchor"),
        _point(0.5, 0.8, blend=0.0, first_token="anchor", anchor="contrast"),
        _point(0.3, 0.5, blend=1.0),
        _point(0.6, 2.0, blend=1.0),
    )
    bounds = {"kl_budget": 1, "max_perplexity_ratio": 2, "min_distinct_ratio": 0.5, "prompts": 8, "tokens": 8}
    plain = {"plain_hit_rate": 0, "plain_perplexity": 5, "plain_distinct_2": 1}
    return make_operator(calibration=Calibration(words=("tea",), points=points, chosen=None, **bounds, **plain)).header


def _at(header, kl, rule="cumulative", blend=0.5, positions=ALL_POSITIONS, anchor="concept", first_token="operator"):
    return strength_within(
        header, kl, rule=rule, blend=blend, positions=positions, anchor=anchor, first_token=first_token
    )


def test_the_curve_of_an_operator_is_its_calibration_at_the_setting(calibrated):
    assert _at(calibrated, 0.25) == 0.2
    assert _at(calibrated, 0.5) == pytest.approx(0.2 * 2**0.5, rel=1e-3)
    # At blend 1, a rule makes no difference.
    assert _at(calibrated, 0.5, rule="substitute", blend=1.0) == 0.3
    assert _at(calibrated, 0.6, anchor="contrast") == 0.4
    assert _at(calibrated, 0.7, anchor="contrast", first_token="anchor") == 0.4


def test_points_of_shorter_texts_are_another_curve(calibrated):
    points = (_point(0.3, 0.5, tokens=16), _point(0.2, 0.25, tokens=24), _point(0.4, 1.0, tokens=24))
    header = calibrated.model_copy(update={"calibration": calibrated.calibration.model_copy(update={"points": points})})
    assert _at(header, 0.5) == pytest.approx(0.2 * 2**0.5, rel=1e-3)


def test_what_was_not_measured_is_an_error(calibrated, make_operator):
    for change in (
        {"blend": 0.25},
        {"anchor": "contrast"},
        {"first_token": "anchor"},
        {"kl": 1.1},
        {"kl": 0.2},
        {"positions": FIRST},
    ):
        with pytest.raises(SettingError, match="kl is"):
            _at(calibrated, **{"kl": 0.5, **change})
    with pytest.raises(SettingError, match="no dose was measured"):
        _at(make_operator().header, 0.5)


def test_the_curve_of_a_lens_is_at_its_positions(tiny, make_random_lens):
    points = [
        DosePoint(strength=s, kl_p95=kl, kl_mean=0.1, hit_rate=0.1, useful_rate=0.1)
        for s, kl in ((0.1, 0.2), (0.2, 0.8))
    ]
    curve = DoseCurve(
        words=("tea",), prompts=1, prompts_digest=f"sha256:{'1' * 64}", tokens=1, plain_hit_rate=0, points=tuple(points)
    )
    header = make_random_lens(tiny("llama", dtype="float32"), lens={"curve": curve}).header
    assert _at(header, 0.8, blend=1.0, positions=FIRST) == 0.2
    with pytest.raises(SettingError, match="at positions first, not all"):
        _at(header, 0.8, blend=1.0)
