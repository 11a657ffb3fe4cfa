"""What a sketch costs, in time and memory, against the whole Jacobian made the paper's way.

    python tests/bench/bench_builder.py [--pairs 7] [--cases llama-8 llama-64 smollm2-128] [--chunk] [--json]

The paper's way is ``torch.autograd.functional.jacobian(f, x, vectorize=True)`` on the detached model. Each side of each
pair runs in a process of its own, after the model is loaded and has run once: seconds of one run, by the clock and of
all threads, and the highest resident memory during it minus what was resident before. The order alternates, and ratios
are taken pair by pair. Where the paper's way does not fit into the memory that is free, or with --chunk, it computes
only a chunk of its rows, by the same vectorised backward pass (``torch.func.vmap`` over ``autograd.grad``): its seconds
are those of the chunk times the number of chunks, its memory is the chunk's times the same number. Both are marked.

    peak     FLOP/s of a 4096 x 4096 x 4096 float32 matmul, best of 3, in the sketch's own process, before and after
    replay   FLOP/s of the replay: a JVP and a VJP of the sketch's number of columns l
             2 products x l columns x 2 FLOP x ((layers - 1) n (V + P) + n V + P), where V is the number of value
             weights of a block and P = O + up + down weights + n x heads x head size

Not a test; nothing here passes or fails. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from operators.builder.memory import range_dtype
from operators.maps.detach import detached
from operators.maps.replay import Replay, target_hidden_state
from operators.maps.sketch import OVERSAMPLE, sketch
from operators.model.loading import LoadedModel, embed, load_model

RANK = 64
# name: (tokens, layer, rows of the chunk that the paper's way computes where all rows do not fit)
CASES = {"llama-8": (8, 4, 256), "llama-64": (64, 4, 64), "smollm2-128": (128, 20, 64)}
# Of the paper's way: bytes per row, position and intermediate channel, measured to be alive at once in float32.
LIVE_BYTES = 12
# Bytes of free memory that are left alone.
SPARE = 4 << 30


def main() -> None:
    """Prints a table (or JSON) of seconds, memory and their ratios."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=7)
    options.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--chunk", action="store_true")
    options.add_argument("--json", action="store_true")
    options.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.side:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(SIDES[arguments.side[0]](arguments.side[1], arguments.chunk)))
        return
    results = {case: [pair(case, number, arguments) for number in range(arguments.pairs)] for case in arguments.cases}
    if arguments.json:
        print(json.dumps(results))
        return
    print(
        f"rank {RANK}, float32, {arguments.threads} threads, torch {torch.__version__}, "
        f"{arguments.pairs} interleaved pairs"
    )
    print(f"{'':12} {'seconds':>19} {'ratio':>22} {'of CPU':>6} {'peak MiB':>19} {'ratio':>7} {'replay':>15}")
    print(
        f"{'case':12} {'paper':>10} {'sketch':>8} {'min':>7} {'median':>7} {'max':>6} {'paper':>10} {'sketch':>8} ",
        end="",
    )
    print(f"{'median':>7} {'GFLOP/s':>8} {'of peak':>8}")
    for case, pairs in results.items():
        print(row(case, pairs))


def row(case: str, pairs: list[dict[str, dict[str, float]]]) -> str:
    """One line of the table: medians, and the range of the ratios in time."""

    def median(side: str, figure: str) -> float:
        return statistics.median(found[side][figure] for found in pairs)

    cpu = statistics.median(found["paper"]["cpu"] / found["sketch"]["cpu"] for found in pairs)
    times = [found["paper"]["seconds"] / found["sketch"]["seconds"] for found in pairs]
    memory = statistics.median(found["paper"]["mebibytes"] / found["sketch"]["mebibytes"] for found in pairs)
    mark = "*" if pairs[0]["paper"]["chunked"] else " "
    return (
        f"{case:12} {median('paper', 'seconds'):9.1f}{mark} {median('sketch', 'seconds'):8.2f} {min(times):7.1f} "
        f"{statistics.median(times):7.1f} {max(times):6.1f} {cpu:6.1f} {median('paper', 'mebibytes'):9.0f}{mark} "
        f"{median('sketch', 'mebibytes'):8.0f} {memory:7.1f} {median('sketch', 'replay'):8.0f} "
        f"{median('sketch', 'replay') / median('sketch', 'peak'):8.0%}" + (" * chunk x number" if mark == "*" else "")
    )


def pair(case: str, number: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Both sides, one after the other, each in a fresh process."""
    found = {}
    for side in list(SIDES)[:: 1 if number % 2 else -1]:
        command = [
            sys.executable,
            __file__,
            "--threads",
            str(arguments.threads),
            "--side",
            side,
            case,
            *["--chunk"] * arguments.chunk,
        ]
        found[side] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"# {case} {number + 1}/{arguments.pairs} {side}: {found[side]}", file=sys.stderr, flush=True)
    return found


def prepare(case: str) -> tuple[PreTrainedModel, tuple[int, ...], int]:
    """The model, the ids and the layer of a case."""
    tokens, layer, _ = CASES[case]
    if case.startswith("smollm2"):
        loaded = load_model("smollm2-135m", dtype="float32")
        return loaded.model, tuple(range(1000, 1000 + tokens)), layer
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layer,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False), tuple(range(tokens)), layer


def warm_up(model: PreTrainedModel, ids: tuple[int, ...]) -> None:
    """One plain forward pass, so that weights are paged in and threads started."""
    with torch.no_grad():
        model(torch.tensor([ids]))


def gemm_peak() -> float:
    """FLOP/s of a large matmul on these threads."""
    left, right = torch.randn(2, 4096, 4096)
    return max(2 * 4096**3 / seconds(lambda: left @ right) for _ in range(3))


def seconds(run: Callable[[], object]) -> float:
    """Seconds of one call, by the clock."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def memory(field: str) -> int:
    """A line of this process's status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) << 10


def measure(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of one call, by the clock and of all threads, and how much resident memory rose in it, in MiB."""
    before = memory("VmRSS")
    # On Linux, this resets the high-water mark of the resident memory.
    Path("/proc/self/clear_refs").write_text("5")
    cpu = time.process_time()
    took = seconds(run)
    cpu = time.process_time() - cpu
    return {"seconds": took, "cpu": cpu, "mebibytes": (memory("VmHWM") - before) / 2**20}


def sketch_side(case: str, _chunk: bool) -> dict[str, float]:
    """One sketch, from the ids; then the replay alone, between two measurements of the machine's peak."""
    model, ids, layer = prepare(case)
    warm_up(model, ids)
    # Its range is found in what a build finds it in: bfloat16 where the CPU multiplies faster in it.
    loaded = LoadedModel(case, model, None, "", "")
    rounded_to = range_dtype(loaded)

    def whole() -> object:
        return sketch(Replay(model, ids, layer=layer, profile="residual"), RANK, root=None, rounded_to=rounded_to)

    found = measure(whole)
    replay = Replay(model, ids, layer=layer, profile="residual")
    n, d = replay.shape
    tangents, cotangents = torch.randn(RANK + OVERSAMPLE, n, d), torch.randn(RANK + OVERSAMPLE, d)
    before = gemm_peak()

    def both_products() -> None:
        replay.jvp(tangents)
        replay.vjp(cotangents)

    both_products()
    speed = statistics.median(2 * len(tangents) * cost(model, n, layer) / seconds(both_products) for _ in range(3))
    return found | {"replay": speed / 1e9, "peak": max(before, gemm_peak()) / 1e9}


def cost(model: PreTrainedModel, n: int, layer: int) -> int:
    """FLOP per vector of one JVP or VJP; norms, gates and sums are not counted."""
    block = model.model.layers[0]
    values = block.self_attn.v_proj.weight.numel()
    others = (block.self_attn.o_proj, block.mlp.up_proj, block.mlp.down_proj)
    position = sum(part.weight.numel() for part in others) + n * block.self_attn.o_proj.in_features
    # In the last block, only the last position is computed beyond the values.
    return 2 * ((layer - 1) * n * (values + position) + n * values + position)


def paper_side(case: str, chunked: bool) -> dict[str, float]:
    """The whole Jacobian, or a chunk of its rows where it does not fit."""
    model, ids, layer = prepare(case)
    warm_up(model, ids)
    x = embed(model, torch.tensor(ids))
    n, d = x.shape

    def f(inputs: torch.Tensor) -> torch.Tensor:
        return target_hidden_state(model, inputs[None], layer=layer, profile="residual")[0]

    need = LIVE_BYTES * d * n * model.config.intermediate_size
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) << 10
    if need + SPARE <= free and not chunked:
        with detached(model):
            found = measure(lambda: torch.autograd.functional.jacobian(f, x, vectorize=True))
        return found | {"chunked": False}
    rows = CASES[case][2]

    def chunk() -> None:
        inputs = x.clone().requires_grad_(True)
        y = f(inputs)
        torch.func.vmap(lambda row: torch.autograd.grad(y, inputs, row, retain_graph=True)[0])(torch.eye(d)[:rows])

    with detached(model):
        found = measure(chunk)
    return {figure: value * d / rows for figure, value in found.items()} | {"chunked": True}


SIDES = {"paper": paper_side, "sketch": sketch_side}

if __name__ == "__main__":
    main()
