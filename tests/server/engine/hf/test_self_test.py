"""The test that an hf engine does of itself at its start."""

import pytest
import torch

from operators.core import hooks
from steer_server.engine.hf import decode
from steer_server.engine.hf.self_test import check_steering
from steer_server.errors import StartupError

STEER = hooks.steer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_passes_and_is_left_as_it_was(tiny, family, dtype):
    loaded = tiny(family, dtype=dtype)
    check_steering(loaded)
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


@pytest.mark.parametrize("change", [torch.neg, lambda push: 0.5 * push, lambda push: push.roll(1, -1)])
def test_a_model_that_is_steered_otherwise_is_not_served(llama, monkeypatch, change):
    monkeypatch.setattr(hooks, "steer", lambda hidden, push: STEER(hidden, change(push)))
    with pytest.raises(StartupError, match=r"^self-test: .*layer \d"):
        check_steering(llama)


def test_a_model_whose_last_block_alone_is_out_of_place_is_not_served(llama, monkeypatch):
    layers = llama.model.model.layers
    monkeypatch.setattr(decode, "decoder_layers", lambda model: [*layers[:2], layers[3], layers[2]])
    with pytest.raises(StartupError, match=r"^self-test: layer \d"):
        check_steering(llama)
