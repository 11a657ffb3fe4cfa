"""What a step did is measured for all layers together, as if each had been measured alone."""

from dataclasses import fields

import pytest
import torch

from operators.core.movement import Movement, movement
from steer_server.engine.vllm.worker import step_movements
from steer_server.engine.vllm.worker.layer_hooks import push_rows
from steer_server.engine.vllm.worker.pushes import TokenSpan
from steer_server.engine.vllm.worker.step_movements import StepMovements
from steer_server.engine.vllm.worker.step_push import StepPush, read_movements
from tests.operations import CountOperations

BATCH, WIDTH = 9, 8


def push_layers(layers, dtype=torch.bfloat16):
    """A pass whose first layer gets no residual, as vLLM's; what each layer did, measured alone; and what is kept."""
    generator = torch.Generator().manual_seed(0)
    movements, step_pushes, alone = StepMovements(), [], []
    for layer in range(layers):
        hidden, residual = torch.randn(2, BATCH, WIDTH, generator=generator).to(dtype)
        rows = torch.randperm(BATCH, generator=generator)[: 3 + layer % 3]
        push = 0.3 * torch.randn(len(rows), WIDTH, generator=generator)
        span = [TokenSpan("a", 0, 0, len(rows))]
        step_push = StepPush(rows, push, torch.ones(len(rows), dtype=torch.bool), span, 1)
        before, others = hidden[rows], residual if layer else None
        push_rows(step_push, hidden, others, movements)
        alone.append(movement(before, hidden[rows], push, None if others is None else others[rows]))
        step_pushes.append(step_push)
    return movements, step_pushes, alone


@pytest.mark.parametrize("room", [1000, 7, 4])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_each_layer_has_the_movements_that_it_has_alone(monkeypatch, layers, room):
    monkeypatch.setattr(step_movements, "tokens_per_chunk", lambda _width: room)
    movements, step_pushes, alone = push_layers(layers)
    movements.measure()
    for step_push, expected in zip(step_pushes, alone, strict=True):
        for name in (each.name for each in fields(Movement)):
            assert torch.equal(getattr(step_push.moved, name), getattr(expected, name))
    for (moved, usable), expected in zip(read_movements(step_pushes), alone, strict=True):
        assert moved == torch.stack((expected.dose, expected.due, expected.rounding), dim=-1).tolist()
        assert usable == [1.0] * len(moved)


def test_more_layers_are_measured_in_no_more_operations():
    counts = []
    for layers in (4, 24):
        movements, step_pushes, _ = push_layers(layers)
        with CountOperations() as operations:
            movements.measure()
            list(read_movements(step_pushes))
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_a_layer_whose_hook_did_not_run_has_no_movements():
    movements, step_pushes, _ = push_layers(2)
    movements.measure()
    unreached = StepPush(torch.tensor([0]), torch.ones(1, WIDTH), torch.tensor([True]), (), 1)
    (_, _), (none, usable), (last, _) = read_movements([step_pushes[0], unreached, step_pushes[1]])
    assert (none, usable) == ([], [True])
    assert len(last) == len(step_pushes[1].rows)
