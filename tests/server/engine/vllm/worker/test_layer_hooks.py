"""The hooks on a model's layers: called on for the pushes of a step, and idle where there are none."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from operators.core.apply import steer
from steer_server.engine.vllm.worker.layer_hooks import forward_pass, install_hooks, reads_residual
from steer_server.engine.vllm.worker_protocol import OperatorSetting

WIDTH, LAYERS, PROMPT = 5, 4, 3


class Operations(TorchDispatchMode):
    """The names of what torch is asked to do while it is active."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Layer(nn.Module):
    def forward(self, positions, hidden_states, residual):
        return hidden_states, residual


class Model(nn.Module):
    """Layers that hand on what they get."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, hidden):
        for layer in self.model.layers:
            layer(None, hidden, None)
        return hidden


@pytest.fixture
def model():
    hooked = Model()
    assert install_hooks(hooked) == LAYERS
    yield hooked
    forward_pass.clear()


def test_a_layer_is_pushed_at_the_first_token_and_no_hook_does_anything_after_it(batch, model):
    batch.begin("a", OperatorSetting("exact", "cumulative", 0.5, 0.0, 0, 1))
    # Rows of nobody lie around those of the request.
    for first, count in ((0, PROMPT), (PROMPT, 1), (PROMPT + 1, 1)):
        _, forward_pass.pushes = batch.prepare(("a", first, count))
        hidden = torch.randn(count + 2, WIDTH, generator=torch.Generator().manual_seed(first))
        expected = hidden.clone()
        if first == 0:
            expected[1:2] = steer(hidden[1:2], batch.expected("a", 2)[:1])
        with Operations() as operations:
            model(hidden)
        assert operations.names.count("steering.push.default") == (first == 0)
        assert bool(operations.names) == (first == 0)
        torch.testing.assert_close(hidden, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(hidden[2:], expected[2:])
        forward_pass.movements.measure()
        batch.steering.record(forward_pass.pushes)
    [measured] = batch.steering.measurement("a").layers
    assert (measured.layer, measured.first, measured.doses) == (2, 0, pytest.approx((0.25,), abs=1e-5))


class SideBySide(nn.Module):
    """As in Cohere: what it is handed as ``residual`` is that of the layer before, and not read."""

    def forward(self, positions, hidden_states, residual):
        residual = hidden_states
        hidden_states, residual = self.norm(hidden_states, residual)
        return residual + hidden_states, residual


class Fused(nn.Module):
    def forward(self, positions, hidden_states, residual):
        if residual is None:
            residual = hidden_states
        else:
            hidden_states, residual = self.norm(hidden_states, residual)
        return hidden_states, residual


class Unfused(nn.Module):
    def forward(self, positions, hidden_states):
        residual = hidden_states
        return residual + hidden_states


@pytest.mark.parametrize(("kind", "reads"), [(SideBySide, False), (Fused, True), (Unfused, False), (Layer, True)])
def test_a_residual_that_a_layer_does_not_read_is_no_part_of_its_input(kind, reads):
    assert reads_residual(kind.forward) is reads
