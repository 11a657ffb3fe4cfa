"""Narrow weights, wide arithmetic: the map of a bfloat16 model is applied in float32."""

import pytest
import torch

from operators.builder.build import build_operator
from operators.builder.concept import Concept
from operators.builder.spec import BuildSpec
from operators.maps.replay import Replay

IDS = (3, 1, 4, 1, 5, 9, 2)


def test_narrow_weights_give_what_the_same_weights_give_when_they_are_wide(tiny, family):
    loaded = tiny(family, dtype="bfloat16", fresh=True)
    replay = Replay(loaded.model, IDS, layer=2, profile="golden")
    assert replay.x.dtype == replay.y.dtype == torch.float32
    tangents = torch.randn(5, *replay.shape, generator=torch.Generator().manual_seed(0))
    cotangents = torch.randn(5, replay.shape[1], generator=torch.Generator().manual_seed(1))

    def both_ways():
        return replay.jvp(tangents), replay.vjp(cotangents)

    narrow = both_ways()
    # The frozen factors stay what was recorded; only the weights change their dtype, and the graph with them.
    loaded.model.float()
    replay._graph = None
    torch.testing.assert_close(narrow, both_ways(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", ["full", 5])
def test_the_operator_of_a_bfloat16_model_is_a_float32_one_and_says_so(tiny, rank):
    artifact = build_operator(BuildSpec((Concept("x", IDS),), layer=2, rank=rank), tiny("llama", dtype="bfloat16"))
    assert (artifact.header.dtype, artifact.header.model_dtype) == ("float32", "bfloat16")
    assert artifact.factors.dtype == torch.float32
    assert 1e-5 < artifact.header.reconstruction_error < 5e-2
