"""Where the time of a steered step goes, without a model: ours alone, in milliseconds per decoding step.

    python tests/bench/bench_pushes.py [--width 576] [--layers 4] [--steps 100] [--threads 1] [--json]

For batches of one-token segments and 1, 16 and 64 operators of rank 64 spread over ``--layers`` layers: working out
the pushes, writing them into the hidden states (bfloat16) and measuring them, and booking what was measured. Medians
over steps. Set them against the step of the model in question. Not a test; nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from operators.core.apply import PreparedOperator, steer
from steer_server.engine.vllm.pushes import Segment
from steer_server.engine.vllm.step_steering import BatchSteering, Sited, Use

POSITIONS, RANK = 6, 64
CASES = ((32, 1), (32, 16), (64, 1), (64, 16), (64, 64))


def main() -> None:
    """Prints a table (or JSON)."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=576)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--threads", type=int, default=1, help="of torch; vLLM's CPU worker on two cores has one")
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    with torch.inference_mode():
        rows = [measure(batch, count, given.width, given.layers, given.steps) for batch, count in CASES]
    if given.json:
        print(json.dumps(rows))
        return
    print(f"width {given.width}, rank {RANK}, {given.layers} layers, {given.threads} thread(s); ms per step")
    print(f"{'batch':>5} {'operators':>9} {'work out':>9} {'push':>6} {'book':>6} {'in all':>7}")
    for row in rows:
        total = row["work_out"] + row["push"] + row["book"]
        print(
            f"{row['batch']:5} {row['operators']:9} {row['work_out']:9.2f} {row['push']:6.2f} {row['book']:6.2f} "
            f"{total:7.2f}"
        )


def measure(batch: int, count: int, width: int, layers: int, steps: int) -> dict[str, float]:
    """Milliseconds of each part of a step."""
    steering = BatchSteering(torch.bfloat16)
    for index in range(count):
        steering.load(str(index), Sited(operator(width, index), index % layers))
    for row in range(batch):
        steering.follow(str(row), (Use(str(row % count), "cumulative", 0.1 * (1 + row % 4), 0.0),), "")
    spent: dict[str, list[float]] = {"work_out": [], "push": [], "book": []}
    for position in range(steps):
        x, hidden = torch.randn(batch, width), torch.randn(batch, width).bfloat16()
        segments = [Segment(str(row), row, position, 1) for row in range(batch)]
        times = [time.perf_counter()]
        sites = steering.prepare(segments, x, _nothing_earlier)
        times.append(time.perf_counter())
        for site in sites.values():
            moved, site.doses = steer(hidden[site.rows], site.push, hidden[site.rows])
            hidden.index_copy_(0, site.rows, moved)
        times.append(time.perf_counter())
        steering.book(sites)
        times.append(time.perf_counter())
        for name, begun, ended in zip(spent, times, times[1:], strict=False):
            spent[name].append(1e3 * (ended - begun))
    return {"batch": batch, "operators": count, **{name: statistics.median(found) for name, found in spent.items()}}


def _nothing_earlier(_request: str, _count: int) -> torch.Tensor:
    raise AssertionError("every request begins at its first token")


def operator(width: int, seed: int) -> PreparedOperator:
    """A random one: what it says costs nothing."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, RANK, generator=generator)).Q
    anchor = torch.randn(width, generator=generator)
    factors = torch.randn(POSITIONS, RANK, width, generator=generator)
    return PreparedOperator(factors, basis, None, torch.randn(width, generator=generator), anchor / anchor.norm())


if __name__ == "__main__":
    main()
