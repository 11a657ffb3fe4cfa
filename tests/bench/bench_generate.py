"""Tokens per second through the server, hf engine, over gRPC, against transformers' `generate` in process.

    OMP_NUM_THREADS=2 python tests/bench/bench_generate.py [--peers /tmp/peers/venv/bin/python] [--also TREE]

Every side is a process of its own with the same model in float32, the same prompt, as many rows and greedy texts of as
many tokens; they take turns, in an order that turns too, and a ratio is of neighbours. The server's time is the
client's, from the call to the whole answer; that of `generate` is its own, of ids to ids. Kinds of the server's rows:

    plain     samples of one text
    anchor    a comparison of as many arms, each with a strength of its own, along an anchor: a constant direction
    operator  the same with half of the direction the operator's, worked out anew from every token

`--peers` is the interpreter of an environment with transformers 4.57, steering-vectors and repeng, which add a constant
vector. `--also` is another checkout of this project, whose server takes its turn too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from steer_client import OperatorUse, SamplingParams, SteerClient

from operators.model.obtain import obtain

PROMPT = "The best thing about today is that we"
LAYER = 15
BIN = Path(sys.executable).parent
WORKER = Path(__file__).with_name("generate_worker.py")
REPOSITORY = Path(__file__).parents[2]


def main() -> None:
    """Prints a table, batch by batch."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument("--kinds", nargs="+", default=["plain", "anchor", "operator"])
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--pairs", type=int, default=7)
    options.add_argument("--peers", help="interpreter with steering-vectors and repeng")
    options.add_argument("--store", help="folder with the operator `bridge`, built there where it is missing")
    options.add_argument("--also", help="another checkout, for a server from before")
    arguments = options.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = _sides(stack, folder, arguments)
        threads = os.environ.get("OMP_NUM_THREADS")
        print(f"OMP_NUM_THREADS={threads}, {arguments.tokens} tokens, {arguments.pairs} rounds")
        for rows in arguments.batch:
            _measure(sides, rows, arguments)


Side = Callable[[int], tuple[float, float, list[list[int]]]]
"""Of so many rows: seconds, CPU seconds, and the ids of every row."""


def _sides(stack: ExitStack, folder: Path, arguments: argparse.Namespace) -> dict[str, Side]:
    source = str(obtain(arguments.model))
    sides: dict[str, Side] = {}
    sides["generate"] = stack.enter_context(_worker(sys.executable, source, arguments))("transformers")
    trees = {"": REPOSITORY} | ({"before: ": Path(arguments.also)} if arguments.also else {})
    store = Path(arguments.store or folder / "store")
    if not (store / "bridge.safetensors").exists():
        build = [str(BIN / "steer-operators"), "build", "bridge", "--text", "The Golden Gate Bridge in San Francisco"]
        command = [*build, "--layer", str(LAYER), "--model", arguments.model, "--store", str(store)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for name, tree in trees.items():
        client, cpu = stack.enter_context(_server(tree, store, arguments))
        for kind in arguments.kinds:
            sides[f"{name}{kind}"] = _ours(client, cpu, kind, arguments.tokens)
    if arguments.peers:
        peers = stack.enter_context(_worker(arguments.peers, str(_for_earlier(source, folder)), arguments))
        sides["4.57: generate"] = peers("transformers")
        sides["4.57: steering-vectors"], sides["4.57: repeng"] = peers("steering-vectors"), peers("repeng")
    return sides


def _measure(sides: dict[str, Side], rows: int, arguments: argparse.Namespace) -> None:
    seconds, cpus = defaultdict(list), defaultdict(list)
    order = list(sides)
    ids = {name: sides[name](rows)[2] for name in order}
    if "plain" in ids and ids["plain"] != ids["generate"]:
        raise AssertionError("plain texts have other ids than those of generate")
    for name in ids:
        if name.startswith("before: ") and ids[name] != ids[name.removeprefix("before: ")]:
            raise AssertionError(f"{name}: its texts have other ids")
    for turn in range(arguments.pairs):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            taken, cpu, _ = sides[name](rows)
            seconds[name].append(taken)
            cpus[name].append(cpu)
    tokens = rows * arguments.tokens
    print(f"\n{rows} rows           tokens/s      over generate            CPU ms a token")
    for name in order:
        ratios = [base / own for own, base in zip(seconds[name], seconds["generate"], strict=True)]
        print(
            f"{name:24} {tokens / statistics.median(seconds[name]):8.1f}   {statistics.median(ratios):5.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f})      {1e3 * statistics.median(cpus[name]) / tokens:8.2f}",
            flush=True,
        )


@contextmanager
def _worker(python: str, source: str, arguments: argparse.Namespace) -> Iterator[Callable[[str], Side]]:
    command = [python, str(WORKER), source, str(LAYER), str(arguments.tokens), PROMPT]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            print(f"{python}: {process.stdout.readline().strip()}")  # type: ignore[union-attr]

            def side(by: str) -> Side:
                def decode(rows: int) -> tuple[float, float, list[list[int]]]:
                    process.stdin.write(json.dumps({"by": by, "rows": rows}) + "\n")  # type: ignore[union-attr]
                    process.stdin.flush()  # type: ignore[union-attr]
                    answer: dict[str, Any] = json.loads(process.stdout.readline())  # type: ignore[union-attr]
                    return answer["seconds"], answer["cpu"], answer["ids"]

                return decode

            yield side
        finally:
            process.kill()


@contextmanager
def _server(
    tree: Path, store: Path, arguments: argparse.Namespace
) -> Iterator[tuple[SteerClient, Callable[[], float]]]:
    """A client of a server of this code, and the server's CPU seconds."""
    path = os.pathsep.join(str(tree / part) for part in (".", "clients/python", "protos"))
    command = [sys.executable, "-m", "steer_server", "--model", arguments.model, "--store", str(store)]
    command += ["--listen", "127.0.0.1:0", "--max-arms", str(max(arguments.batch))]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=store, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        try:
            lines = iter(process.stderr.readline, "")  # type: ignore[union-attr]
            target = next(found[1] for line in lines if (found := re.search(r"listen=(\S+)", line)))
            with SteerClient(target, timeout=600) as client:
                yield client, lambda: _cpu_seconds(process.pid)
        finally:
            process.kill()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _ours(client: SteerClient, cpu: Callable[[], float], kind: str, tokens: int) -> Side:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    blend = {"plain": 0.0, "anchor": 1.0, "operator": 0.5}[kind]

    def decode(rows: int) -> tuple[float, float, list[list[int]]]:
        arms = {str(row): [OperatorUse("bridge", 0.2 + 0.005 * row, blend=blend)] for row in range(rows)}
        # The client's work is ours too.
        began, before, own = time.perf_counter(), cpu(), time.process_time()
        if kind == "plain":
            texts = client.samples(PROMPT, rows, sampling=sampling)
        else:
            result = client.compare(PROMPT, arms=arms, sampling=sampling, score=False, normal=False)
            texts = tuple(result.steered[name].generation for name in arms)
        taken = time.perf_counter() - began
        return taken, cpu() - before + time.process_time() - own, [list(text.token_ids) for text in texts]

    return decode


def _for_earlier(source: str, folder: Path) -> Path:
    """A copy of the model's folder that earlier versions of transformers can read."""
    copy = folder / "model"
    shutil.copytree(source, copy)
    config = json.loads((copy / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (copy / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return copy


if __name__ == "__main__":
    main()
