"""Pushes at layer inputs: on a tiny model, which rows are written, with what, and what is measured."""

import copy

import pytest
import torch
from torch import nn

from operators.core.errors import SteeringError
from operators.core.hooks import LayerPush, PushHooks
from operators.model.loading import decoder_layers

LAYER = 2
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [5, 9, 6, 10]])


class _Recorded:
    """``with _Recorded(loaded) as recorded:`` what enters each block, as the block before it gave it or was pushed."""

    def __init__(self, loaded):
        self.inputs = {}
        self._handles = [
            # After the hooks under test: these see what the block works on.
            block.register_forward_hook(self._hook(layer), with_kwargs=True)
            for layer, block in enumerate(decoder_layers(loaded.model))
        ]

    def _hook(self, layer):
        def hook(_block, args, kwargs, _output):
            self.inputs[layer] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


def _inputs(loaded, pushes, layers=(LAYER,)):
    """What every block works on, and the doses."""
    with torch.no_grad(), PushHooks(decoder_layers(loaded.model), layers) as hooks, _Recorded(loaded) as recorded:
        hooks.load(pushes)
        loaded.model(input_ids=IDS, use_cache=False)
        return recorded.inputs, hooks.take_doses()


def _push(loaded, *rows, tokens=IDS.shape[1], seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    push = torch.randn(len(rows), tokens, loaded.hidden_size, generator=generator)
    return LayerPush(torch.tensor(rows, dtype=torch.int64), scale * push)


def _hooks_left(loaded):
    return sum(len(block._forward_pre_hooks) for block in decoder_layers(loaded.model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_pushed_row_is_h_plus_its_norm_times_the_push_and_the_others_keep_their_bits(tiny, family):
    loaded = tiny(family, dtype="float64")
    plain, nothing = _inputs(loaded, {})
    # Not in the order of the batch.
    push = _push(loaded, 2, 0)
    pushed, doses = _inputs(loaded, {LAYER: push})
    assert nothing == {}
    h = plain[LAYER][push.rows]
    assert h.dtype is torch.float64
    expected = h + h.norm(dim=-1, keepdim=True) * push.push.double()
    # Pushes are added in float32.
    assert float((pushed[LAYER][push.rows] - expected).norm() / expected.norm()) < 1e-6
    assert doses.keys() == {LAYER}
    torch.testing.assert_close(doses[LAYER], push.push.norm(dim=-1), rtol=1e-5, atol=0)
    for layer, before in plain.items():
        assert torch.equal(pushed[layer][1], before[1])
        assert torch.equal(pushed[layer][push.rows], before[push.rows]) == (layer < LAYER)


def test_layers_are_pushed_and_measured_each_by_its_own_rows(tiny):
    loaded = tiny("llama", dtype="float64")
    pushes = {1: _push(loaded, 0), 3: _push(loaded, 1, 2, seed=1, scale=0.2)}
    plain, _ = _inputs(loaded, {})
    pushed, doses = _inputs(loaded, pushes, layers=(3, 1, 3))
    assert {layer: tuple(dose.shape) for layer, dose in doses.items()} == {1: (1, 4), 3: (2, 4)}
    for layer, push in pushes.items():
        torch.testing.assert_close(doses[layer], push.push.norm(dim=-1), rtol=1e-5, atol=0)
    changed = {
        layer: [not torch.equal(*pair) for pair in zip(plain[layer], pushed[layer], strict=True)] for layer in plain
    }
    assert changed == {0: [False] * 3, 1: [True, False, False], 2: [True, False, False], 3: [True] * 3}


def test_a_pass_that_nothing_was_loaded_for_is_plain(tiny):
    loaded = tiny("llama", dtype="float64")
    with torch.no_grad(), PushHooks(decoder_layers(loaded.model), [LAYER]) as hooks:
        plain = loaded.model(input_ids=IDS, use_cache=False).logits
        hooks.load({LAYER: _push(loaded, 0, 1, 2)})
        assert not torch.equal(loaded.model(input_ids=IDS, use_cache=False).logits, plain)
        hooks.take_doses()
        # Reading the doses is the end of these pushes.
        assert torch.equal(loaded.model(input_ids=IDS, use_cache=False).logits, plain)
        assert hooks.take_doses() == {}


def test_a_hook_that_did_not_run_is_an_error(tiny):
    loaded = tiny("llama", dtype="float64")
    with torch.no_grad(), PushHooks(copy.deepcopy(decoder_layers(loaded.model)), [LAYER]) as hooks:
        hooks.load({LAYER: _push(loaded, 0)})
        loaded.model(input_ids=IDS, use_cache=False)
        with pytest.raises(SteeringError, match=f"layer {LAYER} was not reached"):
            hooks.take_doses()


def test_a_pass_that_was_not_made_and_a_layer_without_a_hook_are_errors(tiny):
    loaded = tiny("llama", dtype="float64")
    with torch.no_grad(), PushHooks(decoder_layers(loaded.model), [LAYER]) as hooks:
        hooks.load({LAYER: _push(loaded, 0)})
        with pytest.raises(SteeringError, match=f"layer {LAYER} was not reached"):
            hooks.take_doses()
        hooks.load({1: _push(loaded, 0)})
        loaded.model(input_ids=IDS, use_cache=False)
        with pytest.raises(SteeringError, match="layer 1 was not reached"):
            hooks.take_doses()


def test_a_second_pass_with_the_same_pushes_is_an_error(tiny):
    loaded = tiny("llama", dtype="float64")
    with torch.no_grad(), PushHooks(decoder_layers(loaded.model), [LAYER]) as hooks:
        hooks.load({LAYER: _push(loaded, 0)})
        loaded.model(input_ids=IDS, use_cache=False)
        with pytest.raises(SteeringError, match=f"layer {LAYER} was reached twice"):
            loaded.model(input_ids=IDS, use_cache=False)


@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_a_push_for_another_number_of_tokens_is_an_error_and_not_broadcast(tiny, tokens):
    loaded = tiny("llama", dtype="float64")
    with pytest.raises(SteeringError, match=rf"layer {LAYER}: pushes have the shape \(1, {tokens}, \d+\); .* \(1, 4, "):
        _inputs(loaded, {LAYER: _push(loaded, 0, tokens=tokens)})
    assert _hooks_left(loaded) == 0


def test_the_model_is_left_as_it_was_after_success_and_after_every_error(tiny):
    loaded = tiny("llama", dtype="float64")
    blocks = decoder_layers(loaded.model)
    with PushHooks(blocks, [1, LAYER]):
        assert _hooks_left(loaded) == 2
    assert _hooks_left(loaded) == 0
    with pytest.raises(ZeroDivisionError), PushHooks(blocks, [1, LAYER]):
        raise ZeroDivisionError
    assert _hooks_left(loaded) == 0
    # The hooks of the layers before one that does not exist go too.
    with pytest.raises(IndexError), PushHooks(blocks, [1, LAYER, 99]):
        pytest.fail("a layer that does not exist was hooked")
    assert _hooks_left(loaded) == 0


def test_a_hidden_state_is_found_by_its_place_or_by_its_name():
    class Block(nn.Module):
        def forward(self, hidden_states, scale=1.0):
            return scale * hidden_states

    block, hidden = Block(), torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]], dtype=torch.float64)
    push = LayerPush(torch.tensor([0]), torch.tensor([[[0.5, 0.0]]]))
    expected = torch.tensor([[[11.0, 8.0]], [[2.0, 0.0]]], dtype=torch.float64)
    with PushHooks([block], [0]) as hooks:
        for call in (lambda: block(hidden, 2.0), lambda: block(hidden_states=hidden, scale=2.0)):
            hooks.load({0: push})
            assert torch.equal(call(), expected)
            assert hooks.take_doses()[0].tolist() == [[0.5]]
