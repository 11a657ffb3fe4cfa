"""Narrow weights, wide arithmetic: the map of a bfloat16 model is applied in float32."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from operators.builder.build import build_operator
from operators.builder.concept import Concept
from operators.builder.spec import BuildSpec
from operators.maps.detach import products_in
from operators.maps.detach.rules import wide_linear
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


class _Products(TorchDispatchMode):
    """Counts the matrix products that are made, below vmap."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wide", [True, False])
def test_a_product_converts_its_weight_and_is_one_whatever_goes_through_it(wide, transposed):
    x = torch.randn(1, 3, 5, requires_grad=True)
    weight = torch.randn(5, 7).T if transposed else torch.randn(7, 5)
    weight = weight.to(torch.bfloat16) if wide else weight
    dtype = torch.float32 if wide else torch.bfloat16
    expected = F.linear(x.to(dtype)[0], weight.to(dtype))[None].to(x.dtype)
    cotangents = torch.randn(4, 1, 3, 7)
    with products_in(None if wide else dtype):
        found = wide_linear(x, weight, None)
        # Another one takes the place of what was rounded.
        wide_linear(x, weight + 1, None)
        assert torch.equal(found, expected)
        pulled = [
            torch.autograd.grad(output, x, cotangents, retain_graph=True, is_grads_batched=True)[0]
            for output in (found, expected)
        ]
        assert torch.equal(*pulled)
        with _Products() as products:
            torch.autograd.grad(found, x, cotangents, is_grads_batched=True)
    assert products.count == 1


def test_one_weight_is_rounded_at_a_time(tiny):
    model = tiny("llama", dtype="float32").model
    replay = Replay(model, (1, 2, 3), layer=2, profile="residual")
    before = _rounded_numbers()
    with products_in(torch.bfloat16):
        replay.vjp(torch.randn(4, 40))
        replay.jvp(torch.randn(4, 3, 40))
        assert 0 < _rounded_numbers() - before <= max(weight.numel() for weight in model.model.layers.parameters())
    assert _rounded_numbers() == before


def _rounded_numbers():
    gc.collect()
    tensors = {t.untyped_storage()._cdata: t for t in gc.get_objects() if type(t) is torch.Tensor}
    return sum(t.untyped_storage().size() // 2 for t in tensors.values() if t.dtype == torch.bfloat16)
