
import pytest

from steer_server.errors import SteeringNotAppliedError

_LAYER = 2
_PROMPT = "the golden bridge in the bay"


def test_a_strength_that_is_lost_in_rounding_is_an_error(tiny, artifact, plan_of, decode):
    coarse = tiny("llama", dtype="bfloat16")
    with pytest.raises(SteeringNotAppliedError, match="rounding") as caught:
        decode(coarse, plan_of((artifact, 1e-9)))
    assert "operator-0=1e-09" in str(caught.value)
    ids, _, _ = decode(coarse, plan_of((artifact, 0.5)))
    assert len(ids[0]) == 6
