"""Where the time of a steered step goes, without a model: milliseconds per decoding step that steering takes.

    python tests/bench/bench_pushes.py [--width 576] [--layers 4] [--steps 100] [--threads 1] [--json]

For batches of one-token spans and 1, 16 and 64 operators of rank 64 spread over ``--layers`` layers: computing
the pushes, writing them into the hidden states (bfloat16) and measuring them, and recording what was measured. Medians
over steps, and the number of torch's operations in the last one. The cases "first" push the first token only, and show
what a later step costs. Compare them with the step of the model in question. Not a test; nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from operators.core.apply import PreparedOperator
from operators.core.positions import Positions
from steer_server.engine.vllm.worker.layer_hooks import push_rows
from steer_server.engine.vllm.worker.pushes import TokenSpan
from steer_server.engine.vllm.worker.step_steering import LoadedOperator, StepSteering
from steer_server.engine.vllm.worker_protocol import OperatorSetting

POSITIONS, RANK = 6, 64
ALL, FIRST = Positions(), Positions(end=1)
CASES = (
    (32, 1, ALL),
    (32, 16, ALL),
    (64, 1, ALL),
    (64, 16, ALL),
    (64, 64, ALL),
    (32, 16, FIRST),
    (64, 64, FIRST),
)


class CountOperations(TorchDispatchMode):
    """Counts what torch is asked to do while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return function(*args, **(kwargs or {}))


def main() -> None:
    """Prints a table (or JSON)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1, help="of torch; vLLM's CPU worker on two cores has one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        rows = [
            measure(batch, count, positions, options.width, options.layers, options.steps)
            for batch, count, positions in CASES
        ]
    if options.json:
        print(json.dumps(rows))
        return
    print(f"width {options.width}, rank {RANK}, {options.layers} layers, {options.threads} thread(s); ms per step")
    print(
        f"{'batch':>5} {'operators':>9} {'positions':>9} {'compute':>9} {'push':>6} {'record':>6} {'in all':>7} "
        f"{'operations':>10}"
    )
    for row in rows:
        total = row["compute"] + row["push"] + row["record"]
        print(
            f"{row['batch']:5} {row['operators']:9} {row['positions']:>9} {row['compute']:9.3f} {row['push']:6.3f} "
            f"{row['record']:6.3f} {total:7.3f} {row['operations']:10}"
        )


def measure(batch: int, count: int, positions: Positions, width: int, layers: int, steps: int) -> dict[str, Any]:
    """Milliseconds of each part of a step after the first one, and the operations of the last one."""
    steering = StepSteering()
    for index in range(count):
        steering.load(str(index), LoadedOperator(operator(width, index), index % layers))
    for row in range(batch):
        strength = 0.1 * (1 + row % 4)
        setting = OperatorSetting(str(row % count), "cumulative", strength, 0.0, *positions.interval(1))
        steering.add_request(str(row), (setting,), salt="")
    spent: dict[str, list[float]] = {"compute": [], "push": [], "record": []}
    embeddings, hidden = torch.randn(steps, batch, width), torch.randn(steps, batch, width).bfloat16()
    for position in range(steps):
        times = _step(steering, batch, position, embeddings[position], hidden[position])
        if position:
            for name, begun, ended in zip(spent, times, times[1:], strict=False):
                spent[name].append(1e3 * (ended - begun))
    x, rows = embeddings[0], hidden[0]
    with CountOperations() as operations:
        _step(steering, batch, steps, x, rows)
    medians = {name: statistics.median(found) for name, found in spent.items()}
    return {
        "batch": batch,
        "operators": count,
        "positions": str(positions),
        **medians,
        "operations": operations.count,
    }


def _step(steering: StepSteering, batch: int, position: int, x: torch.Tensor, hidden: torch.Tensor) -> list[float]:
    """One step; when its parts began and when it ended, in seconds."""
    times = [time.perf_counter()]
    spans = [TokenSpan(str(row), row, position, 1) for row in range(batch)]
    pushes = steering.prepare(spans, lambda needed: x[: len(needed)], _embed_prefix)
    times.append(time.perf_counter())
    for push in pushes.values():
        push_rows(push, hidden, hidden)
    times.append(time.perf_counter())
    steering.record(pushes)
    times.append(time.perf_counter())
    return times


def _embed_prefix(_request: str, _start: int, _end: int) -> torch.Tensor:
    raise AssertionError("every request begins at its first token")


def operator(width: int, seed: int) -> PreparedOperator:
    """A random one: the time does not depend on its values."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, RANK, generator=generator)).Q
    anchor = torch.randn(width, generator=generator)
    factors = torch.randn(POSITIONS, RANK, width, generator=generator)
    return PreparedOperator(factors, basis, None, torch.randn(width, generator=generator), anchor / anchor.norm())


if __name__ == "__main__":
    main()
