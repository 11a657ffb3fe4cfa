"""The built-in models with their real weights. ``make test`` gets both before it starts."""

import functools

import pytest
import torch

from operators.builder.concept import concept_from_text
from operators.maps.jacobian import relative_error
from operators.maps.replay import Replay
from operators.model.loading import LoadedModel, load_model

pytestmark = pytest.mark.model

TEXT = "The bridge out of Marin is the Golden"
DEPTH = {"smollm2-135m": 30, "gemma3-270m": 18}
TOLERANCE = {"float32": 5e-6, "bfloat16": 3e-2}
NUM_COTANGENTS = 16


@pytest.fixture(scope="module")
def load(smollm):
    @functools.cache
    def gemma(dtype: str) -> LoadedModel:
        return load_model("gemma3-270m", dtype=dtype)

    return lambda name, dtype: smollm(dtype) if name == "smollm2-135m" else gemma(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", DEPTH)
def test_the_map_gives_the_hidden_state_back_at_the_first_the_middle_and_the_last_layer(load, name, dtype):
    loaded, depth = load(name, dtype), DEPTH[name]
    ids = concept_from_text(TEXT, loaded).ids
    generator = torch.Generator().manual_seed(4)
    cotangents = torch.randn(NUM_COTANGENTS, loaded.hidden_size, generator=generator)
    for profile, last in (("residual", depth - 1), ("golden", depth)):
        for layer in (1, depth // 2, last):
            replay = Replay(loaded.model, ids, layer=layer, profile=profile)
            assert relative_error(replay.reconstruction(), replay.y) <= TOLERANCE[dtype], (profile, layer)
            # Row by row: u^T J x, from J^T u, against u^T y.
            rows = torch.einsum("qnd,nd->q", replay.vjp(cotangents).double(), replay.x.double())
            expected = cotangents.double() @ replay.y.double()
            scale = torch.linalg.vector_norm(replay.y.double()) * len(replay.y) ** 0.5
            assert (rows - expected).abs().max() / scale <= TOLERANCE[dtype], (profile, layer)
            assert not replay.offset.any()


def test_gemma_has_its_published_shape(load):
    loaded = load("gemma3-270m", "float32")
    assert type(loaded.model).__name__ == "Gemma3ForCausalLM"
    assert (loaded.num_layers, loaded.hidden_size, loaded.context_length) == (18, 640, 32768)


def test_gemma_gets_its_bos_and_knows_the_bridge(load):
    loaded = load("gemma3-270m", "float32")
    ids = loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == loaded.tokenizer.bos_token_id == 2
    assert loaded.tokenizer.decode(ids[0, 1:]) == TEXT
    with torch.no_grad():
        logits = loaded.model(ids).logits[0, -1]
    assert loaded.tokenizer.decode(logits.argmax()) == " Gate"
