"""Where the time of a steered step goes, without a model: the CPU time per decoding step that steering takes.

    python -m tests.bench.bench_pushes [--width 576] [--layers 4] [--steps 100] [--dtype bfloat16] [--json]

For batches of one-token spans and 1, 16, 32 and 64 operators of rank 64 spread over ``--layers`` layers: computing
the pushes, writing them into the hidden states, measuring these, looking at some of them as the server asks,
and recording what was found. Medians over steps (of looking, the mean), and how many operations of torch that is. The
cases "first" push the first token only, and show what a later step costs. Compare them with the step of the model in
question. Not a test; nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch

from operators.core.apply import PreparedOperator
from operators.core.positions import Positions
from steer_server.engine.proof import choose_positions
from steer_server.engine.vllm.worker.layer_hooks import push_rows
from steer_server.engine.vllm.worker.pushes import TokenSpan
from steer_server.engine.vllm.worker.step_movements import StepMovements
from steer_server.engine.vllm.worker.step_push import StepPush
from steer_server.engine.vllm.worker.step_steering import LoadedOperator, StepSteering
from steer_server.engine.vllm.worker.witness import LayerSight, Witness
from steer_server.engine.vllm.worker_protocol import OperatorSetting
from tests.operations import CountOperations

POSITIONS, RANK = 6, 64
PARTS = ("compute", "push", "measure", "look", "record")
ALL, FIRST = Positions(), Positions(end=1)
CASES = (
    (32, 1, ALL),
    (32, 16, ALL),
    (64, 1, ALL),
    (64, 16, ALL),
    (32, 32, ALL),
    (64, 64, ALL),
    (32, 16, FIRST),
    (64, 64, FIRST),
)


def main() -> None:
    """Prints a table (or JSON)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the hidden states")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # As vLLM's worker has it on two cores.
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [
            measure(
                batch, count, positions, options.width, options.layers, options.steps, getattr(torch, options.dtype)
            )
            for batch, count, positions in CASES
        ]
    if options.json:
        print(json.dumps(rows))
        return
    print(f"width {options.width}, rank {RANK}, {options.layers} layers, {options.dtype}; CPU ms per step")
    print("batch operators positions" + "".join(f"{part:>9}" for part in (*PARTS, "in all")) + "  operations of each")
    for row in rows:
        spent = [row["ms"][part] for part in PARTS]
        asked = [row["operations"][part] for part in PARTS]
        print(
            f"{row['batch']:5} {row['operators']:9} {row['positions']:>9}"
            + "".join(f"{each:9.3f}" for each in (*spent, sum(spent)))
            + f"  {' + '.join(f'{each:.3g}' for each in asked)} = {sum(asked):.4g}"
        )


def measure(
    batch: int,
    count: int,
    positions: Positions,
    width: int,
    layers: int,
    steps: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Of each part of a step after the first one: its milliseconds (median), and its operations (mean)."""
    embeddings, hidden = torch.randn(steps, batch, width), torch.randn(steps, batch, width).to(dtype)
    milliseconds: dict[str, list[float]] = {part: [] for part in PARTS}
    operations: dict[str, list[float]] = {part: [] for part in PARTS}
    for found, clock in ((milliseconds, Milliseconds), (operations, CountOperations)):
        decode = Decoding(batch, count, positions, width, layers, steps)
        for position in range(steps):
            step = dict.fromkeys(PARTS, 0.0)
            for part, do in decode.parts(position, embeddings[position], hidden[position]):
                with clock() as spent:
                    do()
                step[part] += spent.count
            for part in PARTS if position else ():
                found[part].append(step[part])
    medians = {part: statistics.median(each) for part, each in milliseconds.items()}
    # In most steps nothing is looked at.
    medians["look"] = statistics.mean(milliseconds["look"])
    return {
        "batch": batch,
        "operators": count,
        "positions": str(positions),
        "ms": medians,
        "operations": {part: statistics.mean(each) for part, each in operations.items()},
    }


class Milliseconds:
    """Counts those of this thread in a ``with`` block, whatever else the machine does."""

    def __enter__(self) -> Self:
        self._begun = time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.count = 1e3 * (time.thread_time() - self._begun)


class Decoding:
    """A batch of requests that all begin at once, each with its own text, strength and operator."""

    def __init__(self, batch: int, count: int, positions: Positions, width: int, layers: int, steps: int) -> None:
        self._batch, self._steering, self._witness = batch, StepSteering(), Witness()
        for index in range(count):
            self._steering.load(str(index), LoadedOperator(operator(width, index), index % layers))
        for row in range(batch):
            strength, pushed = 0.1 * (1 + row % 4), positions.interval(1)
            setting = OperatorSetting(str(row % count), "cumulative", strength, 0.0, *pushed)
            self._steering.add_request(str(row), (setting,), salt="")
            end = steps if pushed[1] is None else pushed[1]
            self._witness.add(str(row), {row % count % layers: [*choose_positions(range(end), 1, random.Random(row))]})

    def parts(self, position: int, x: torch.Tensor, hidden: torch.Tensor) -> Iterator[tuple[str, Callable[[], None]]]:
        """The parts of one step, in their order, as vLLM's worker does them."""
        spans = [TokenSpan(str(row), row, position, 1) for row in range(self._batch)]
        ids = torch.zeros(self._batch, dtype=torch.int64)
        sights: dict[int, LayerSight] = {}
        pushes: dict[int, StepPush] = {}
        movements = StepMovements()

        def look() -> None:
            sights.update(self._witness.watch(spans, ids))

        def compute() -> None:
            pushes.update(self._steering.prepare(spans, lambda needed: x[: len(needed)], _embed_prefix))

        def see_before() -> None:
            for sight in sights.values():
                sight.see_before(hidden, hidden)

        def push() -> None:
            for one in pushes.values():
                push_rows(one, hidden, hidden, movements)

        def see_after() -> None:
            for sight in sights.values():
                sight.see_after(hidden)
            self._witness.read()

        yield "look", look
        yield "compute", compute
        yield "look", see_before
        yield "push", push
        yield "look", see_after
        yield "measure", movements.measure
        yield "record", lambda: self._steering.record(pushes)


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
