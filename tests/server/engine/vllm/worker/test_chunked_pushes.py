"""A step in chunks, held against one text at a time, and what it takes: tensors of a chunk, and one per layer."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from operators.core.apply import PreparedOperator, steer
from steer_server.engine.vllm.worker import layer_hooks, step_movements
from steer_server.engine.vllm.worker.chunked_pushes import tokens_per_chunk
from steer_server.engine.vllm.worker.layer_hooks import push_rows
from steer_server.engine.vllm.worker.pushes import TokenSpan
from steer_server.engine.vllm.worker.step_movements import StepMovements
from steer_server.engine.vllm.worker.step_push import StepPush, read_movements
from steer_server.engine.vllm.worker.step_steering import LoadedOperator, StepSteering
from steer_server.engine.vllm.worker_protocol import OperatorSetting


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def a_setting(chance, loaded):
    start = chance.choice([0, 0, 3, 11])
    return OperatorSetting(
        chance.choice(sorted(loaded)),
        chance.choice(["cumulative", "substitute"]),
        chance.choice([0.7, -0.4, 0.2]),
        chance.choice([0.0, 0.3, 1.0]),
        start,
        chance.choice([None, start + 5]),
        first_token=chance.choice(["operator", "anchor"]),
    )


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_of_a_batch_in_chunks_is_pushed_as_if_it_were_alone(batch, chunk, seed):
    batch.steering._chunk = chunk
    chance = random.Random(seed)
    lengths = {f"r{number}": chance.randint(1, 24) for number in range(5)}
    for request, length in lengths.items():
        settings = [a_setting(chance, batch.loaded) for _ in range(chance.randint(1, 4))]
        batch.begin(request, *settings, x=batch.embeddings(length, chance.randrange(1 << 20)))
    at = dict.fromkeys(lengths, 0)
    # One comes back at its third token: its sums are made again, in chunks too.
    back = max(lengths, key=lengths.get)
    while left := [request for request in lengths if at[request] < lengths[request]]:
        parts = [(request, at[request], chance.randint(1, lengths[request] - at[request])) for request in left]
        pushed = batch.step(*parts)
        for request, first, count in parts:
            for layer in (2, 3):
                expected = batch.expected(request, layer)[first : first + count]
                close(pushed.get((request, layer), torch.zeros_like(expected)), expected)
            at[request] += count
        if back and at[back] > 3:
            at[back], back = 2, ""
    # Strengths may cancel, which is a failure of its own; no position is left out.
    assert not any("not steered" in batch.failure(request) for request in lengths)


def test_a_layer_is_pushed_in_parts_as_it_is_at_once(monkeypatch):
    hidden, residual, push = torch.randn(3, 23, 8)
    rows = torch.randperm(23)[:17]
    span = [TokenSpan("a", 0, 0, 17)]
    pushed = []
    for size in (100, 4):
        for module in (layer_hooks, step_movements):
            monkeypatch.setattr(module, "tokens_per_chunk", lambda _width, size=size: size)
        step_push = StepPush(rows, 0.1 * push[:17], torch.ones(17, dtype=torch.bool), span, 1)
        pushed.append((hidden.clone(), step_push))
        movements = StepMovements()
        push_rows(step_push, pushed[-1][0], residual, movements)
        movements.measure()
    close(pushed[1][0], pushed[0][0])
    close(pushed[1][0][rows], steer(hidden[rows], 0.1 * push[:17], residual[rows]))
    (at_once, _), (in_parts, _) = read_movements([step_push for _, step_push in pushed])
    close(torch.tensor(in_parts), torch.tensor(at_once))


class Largest(TorchDispatchMode):
    """The most elements of a tensor that was made, and how many were made that have more than ``size``."""

    def __init__(self, size):
        super().__init__()
        self.size, self.largest, self.num_large = size, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        fresh = isinstance(made, torch.Tensor) and not any(
            isinstance(arg, torch.Tensor) and arg.untyped_storage().data_ptr() == made.untyped_storage().data_ptr()
            for arg in args
        )
        if fresh:
            self.largest = max(self.largest, made.untyped_storage().nbytes() // made.element_size())
            self.num_large += made.untyped_storage().nbytes() // made.element_size() > self.size
        return made


def test_sixteen_operators_take_one_tensor_per_layer_and_not_one_each():
    width, tokens, operators, layers, chunk = 32, 512, 16, 2, 64
    steering = StepSteering(chunk=chunk)
    for index in range(operators):
        vectors = torch.randn(3, width)
        operator = PreparedOperator(torch.randn(2, 4, width), torch.randn(width, 4), None, vectors[0], vectors[1])
        steering.load(str(index), LoadedOperator(operator, index % layers))
    settings = tuple(OperatorSetting(str(index), "cumulative", 0.1, 0.5) for index in range(operators))
    steering.add_request("a", settings, "")
    x = torch.randn(tokens, width)
    with Largest(chunk * width) as made:
        pushes = steering.prepare([TokenSpan("a", 0, 0, tokens)], lambda _: x, lambda *_: x)
    assert sorted(pushes) == [0, 1]
    assert made.largest == tokens * width
    # All else is of a chunk; the embeddings are the caller's.
    assert made.num_large == layers


def test_a_chunk_is_a_few_mebibytes_whatever_the_model():
    assert [4 * width * tokens_per_chunk(width) <= 4 << 20 for width in (8, 576, 4096, 16384)] == [True] * 4
    assert tokens_per_chunk(1 << 24) == 1
