"""A vector is calibrated at its own layer, at blend 1, and by strength alone."""

import pytest
import torch

from operators.core.errors import BuildError
from operators.tune.calibrate import calibrate
from operators.tune.calibration_spec import CalibrationSpec

PROMPTS = ("The bay", "Here is a painting of the", "My dress")


def test_only_strengths_are_tried(tiny, make_rank_0):
    loaded = tiny("llama", dtype="float32")
    vector = make_rank_0(loaded=loaded)
    spec = CalibrationSpec(("e",), PROMPTS, kl_budget=2.0, max_perplexity_ratio=1e9, min_distinct_ratio=0, tokens=4)
    found = calibrate(vector, loaded, spec)
    points = found.header.calibration.points
    assert {(point.layer, point.rule, point.blend, point.anchor) for point in points} == {
        (2, "cumulative", 1.0, "concept")
    }
    assert {str(point.positions) for point in points} == {"all", "first", "1.."}
    assert len({point.strength for point in points}) > 1
    assert torch.equal(found.anchor, vector.anchor)
    assert found.header.recommended.blend == 1.0


def test_another_layer_is_refused(tiny, make_rank_0):
    loaded = tiny("llama", dtype="float32")
    with pytest.raises(BuildError, match="layer 3: the operator is a vector of layer 2"):
        calibrate(make_rank_0(loaded=loaded), loaded, CalibrationSpec(("e",), PROMPTS, layers=(2, 3)))
