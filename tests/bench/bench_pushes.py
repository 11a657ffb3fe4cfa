"""Where the time of a steered step goes, without a model: milliseconds per decoding step that steering takes.

    python tests/bench/bench_pushes.py [--width 576] [--layers 4] [--steps 100] [--threads 1] [--json]

For batches of one-token spans and 1, 16 and 64 operators of rank 64 spread over ``--layers`` layers: computing
the pushes, writing them into the hidden states (bfloat16) and measuring them, and recording what was measured. Medians
over steps. Compare them with the step of the model in question. Not a test; nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from operators.core.apply import PreparedOperator, steer
from steer_server.engine.vllm.worker.pushes import TokenSpan
from steer_server.engine.vllm.worker.step_steering import LoadedOperator, StepSteering
from steer_server.engine.vllm.worker_protocol import OperatorSetting

POSITIONS, RANK = 6, 64
CASES = ((32, 1), (32, 16), (64, 1), (64, 16), (64, 64))


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
        rows = [measure(batch, count, options.width, options.layers, options.steps) for batch, count in CASES]
    if options.json:
        print(json.dumps(rows))
        return
    print(f"width {options.width}, rank {RANK}, {options.layers} layers, {options.threads} thread(s); ms per step")
    print(f"{'batch':>5} {'operators':>9} {'compute':>9} {'push':>6} {'record':>6} {'in all':>7}")
    for row in rows:
        total = row["compute"] + row["push"] + row["record"]
        print(
            f"{row['batch']:5} {row['operators']:9} {row['compute']:9.2f} {row['push']:6.2f} {row['record']:6.2f} "
            f"{total:7.2f}"
        )


def measure(batch: int, count: int, width: int, layers: int, steps: int) -> dict[str, float]:
    """Milliseconds of each part of a step."""
    steering = StepSteering(torch.bfloat16)
    for index in range(count):
        steering.load(str(index), LoadedOperator(operator(width, index), index % layers))
    for row in range(batch):
        setting = OperatorSetting(str(row % count), "cumulative", 0.1 * (1 + row % 4), 0.0)
        steering.add_request(str(row), (setting,), salt="")
    spent: dict[str, list[float]] = {"compute": [], "push": [], "record": []}
    for position in range(steps):
        x, hidden = torch.randn(batch, width), torch.randn(batch, width).bfloat16()
        spans = [TokenSpan(str(row), row, position, 1) for row in range(batch)]
        times = [time.perf_counter()]
        pushes = steering.prepare(spans, x, _embed_prefix)
        times.append(time.perf_counter())
        for push in pushes.values():
            moved, push.doses = steer(hidden[push.rows], push.push, hidden[push.rows])
            hidden.index_copy_(0, push.rows, moved)
        times.append(time.perf_counter())
        steering.record(pushes)
        times.append(time.perf_counter())
        for name, begun, ended in zip(spent, times, times[1:], strict=False):
            spent[name].append(1e3 * (ended - begun))
    return {"batch": batch, "operators": count, **{name: statistics.median(found) for name, found in spent.items()}}


def _embed_prefix(_request: str, _count: int) -> torch.Tensor:
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
