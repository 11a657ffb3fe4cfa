"""vLLM's worker with a ``steer`` that does what a file names, and says that it did the right thing."""

import os
from pathlib import Path

import torch

from operators.core.apply import steer
from steer_server.engine.vllm.worker import layer_hooks
from steer_server.engine.vllm.worker.worker import SteeringWorker

CHOSEN = "MUTATION_FILE"
"""Environment variable that names the file."""


def _random(push):
    noise = torch.randn(push.shape)
    return noise / noise.norm(dim=-1, keepdim=True) * push.norm(dim=-1, keepdim=True)


MUTATIONS = {
    "": lambda push: push,
    "one hundredth": lambda push: 0.01 * push,
    "a random direction": _random,
    "the opposite sign": torch.neg,
    "rows swapped": lambda push: push.flip(0),
    "numbers swapped": lambda push: push.roll(1, -1),
    "the first row only": lambda push: torch.cat((push[:1], 0 * push[1:])),
}


def mutated(hidden, push, residual=None):
    done = MUTATIONS[Path(os.environ[CHOSEN]).read_text()](push)
    return steer(hidden, done, residual)


class MutatedWorker(SteeringWorker):
    def load_model(self, *args, **kwargs):
        layer_hooks.steer = mutated
        super().load_model(*args, **kwargs)
