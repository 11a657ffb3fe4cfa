import pytest
import torch

from operators.maps import replay as replaying
from operators.maps.jacobian import detached_jacobian, relative_error
from operators.maps.replay import Replay
from operators.model.loading import decoder_layers

IDS = (277, 12, 290, 65, 278, 69, 317)


def _random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("positions", [1, 20, 35, 10_000])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_products_are_the_same_in_passes_of_any_size(tiny, monkeypatch, family, positions):
    dense = detached_jacobian(tiny(family).model, IDS, layer=2, profile="golden").jacobian
    monkeypatch.setattr(replaying, "_POSITIONS_PER_PASS", positions)
    replay = Replay(tiny(family).model, IDS, layer=2, profile="golden")
    n, d = replay.shape
    for count in (7, 3, 12):
        v, u = _random(count, n, d), _random(count + 1, d)
        assert relative_error(replay.jvp(v), torch.einsum("nij,lnj->li", dense, v)) <= 1e-12
        assert relative_error(replay.vjp(u), torch.einsum("nij,li->lnj", dense, u)) <= 1e-12


def test_products_are_counted_and_reported_pass_by_pass(tiny):
    reported = []
    replay = Replay(
        tiny("llama").model, IDS, layer=2, profile="residual", vectors_per_pass=4, on_products=reported.append
    )
    replay.jvp(_random(5, *replay.shape))
    replay.vjp(_random(6, 40))
    assert reported == [3, 2, 3, 3]
    assert replay.products == 11


def test_offset_reconstruction_and_last_term_take_one_pass_beside_the_recording(tiny):
    loaded, passes = tiny("gpt2", fresh=True), []
    decoder_layers(loaded.model)[0].register_forward_hook(lambda *_: passes.append(1))
    replay = Replay(loaded.model, IDS, layer=2, profile="golden")
    found = replay.reconstruction(), replay.last_term(), replay.offset
    assert len(passes) == 2
    dense = detached_jacobian(loaded.model, IDS, layer=2, profile="golden")
    for value, expected in zip(found, (dense.y, dense.jacobian[-1] @ dense.x[-1], dense.offset), strict=True):
        assert relative_error(value, expected) <= 1e-12


def test_the_inner_layer_of_the_last_block_sees_one_position_and_the_others_all(tiny, family):
    loaded = tiny(family, fresh=True)
    replay = Replay(loaded.model, IDS, layer=3, profile="residual")
    inner = [
        [module for name, module in block.named_modules() if name in ("mlp.down_proj", "mlp.c_proj", "mlp")][-1]
        for block in decoder_layers(loaded.model)
    ]
    seen = []
    for module in inner[:3]:
        module.register_forward_hook(lambda _module, _args, output: seen.append(output.shape[1]))
    replay.jvp(_random(2, *replay.shape))
    assert seen == [len(IDS), len(IDS), 1]
