"""What a text costs over HTTP: the doors of one server asked in turn for the same streams.

    python tests/bench/bench_http.py [--engine hf|vllm] [--pairs 9] [--streams 1,16] [--tokens 64] [--json]

Starts a server in a process of its own, with an operator, and asks it for steered texts by bare clients, each stream
on a connection of its own. The arms:

    grpc      GenerateStream, by the generated stub; what the others are divided by
    openai    /v1/completions, as server-sent events
    contract  /api/GenerateStream, as server-sent events

Reports, per number of streams, the ratio of tokens per second, of the time to the first token, and of the server's CPU
time per token, round by round in a random order: machines drift, and neighbours drift least. Ratios above 1 are better
than over gRPC. Not a test; nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import grpc
import psutil
from steering.v1 import generation_pb2 as pb
from steering.v1 import generation_pb2_grpc

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.store import Store
from operators.model.loading import load_model

MODEL = "smollm2-135m"
PROMPT = "I went to see the"
OPERATOR = {"name": "bridge", "strength": 0.4, "blend": 0.5}
OPTIONS = {
    "hf": ("--max-running", "64", "--max-queue", "64"),
    "vllm": ("--engine", "vllm", "--engine-args", "enforce_eager=true", "--engine-args", "max_model_len=512"),
}
REST = 1.0
"""Seconds between two runs."""


@dataclass(frozen=True)
class Run:
    """Of all streams of one run together, and the median of their first tokens in seconds."""

    rate: float
    first: float
    cpu: float
    """Seconds of the server's process for each token."""


@dataclass(frozen=True)
class Doors:
    """Where a server listens."""

    grpc: str
    http: int
    process: psutil.Process


Stream = Callable[[Doors, int, int], Awaitable[tuple[float, int]]]
"""Given the doors, a number of tokens and a seed: when the first token came, and how many there were."""


async def over_grpc(doors: Doors, tokens: int, seed: int) -> tuple[float, int]:
    """See :data:`Stream`."""
    request = pb.GenerateRequest(prompt={"text": PROMPT}, sampling=_sampling(tokens, seed), operators=[OPERATOR])
    options = (("grpc.use_local_subchannel_pool", 1),)
    first, count = 0.0, 0
    async with grpc.aio.insecure_channel(doors.grpc, options) as channel:
        async for event in generation_pb2_grpc.GenerationServiceStub(channel).GenerateStream(request):
            if event.HasField("delta") and event.delta.token_ids:
                first, count = first or time.monotonic(), count + 1
    return first, count


async def over_openai(doors: Doors, tokens: int, seed: int) -> tuple[float, int]:
    """See :data:`Stream`."""
    own = {"model": MODEL, "prompt": PROMPT, "stream": True, "steering": {"operators": [OPERATOR]}}
    body = {**own, **_sampling(tokens, seed), "return_token_ids": True}
    first, count = 0.0, 0
    async for event in _events(doors.http, "/v1/completions", body):
        found = sum(len(choice.get("token_ids", ())) for choice in event["choices"])
        first, count = first or (time.monotonic() if found else 0.0), count + found
    return first, count


async def over_contract(doors: Doors, tokens: int, seed: int) -> tuple[float, int]:
    """See :data:`Stream`."""
    body = {"prompt": {"text": PROMPT}, "sampling": _sampling(tokens, seed), "operators": [OPERATOR]}
    first, count = 0.0, 0
    async for event in _events(doors.http, "/api/GenerateStream", body):
        if event.get("delta", {}).get("token_ids"):
            first, count = first or time.monotonic(), count + 1
    return first, count


ARMS: dict[str, Stream] = {"grpc": over_grpc, "openai": over_openai, "contract": over_contract}


def _sampling(tokens: int, seed: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "temperature": 1.0, "seed": seed, "ignore_eos": True}


async def _events(port: int, path: str, body: dict[str, Any]):
    """The values of a stream of server-sent events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    while await reader.readline() != b"\r\n":
        pass
    if b" 200 " not in status:
        raise SystemExit(f"{path}: {(await reader.read()).decode()}")
    while size := int(await reader.readline(), 16):
        chunk = (await reader.readexactly(size + 2))[:-2]
        for line in chunk.splitlines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line[6:])
    writer.close()


async def run(stream: Stream, doors: Doors, streams: int, tokens: int, seed: int) -> Run:
    """So many streams at once."""
    began, worked = time.monotonic(), sum(doors.process.cpu_times()[:2])
    found = await asyncio.gather(*(stream(doors, tokens, seed + index) for index in range(streams)))
    seconds = time.monotonic() - began
    counts = [count for _, count in found]
    if set(counts) != {tokens}:
        raise SystemExit(f"{counts} tokens came; {tokens} were asked for")
    cpu = (sum(doors.process.cpu_times()[:2]) - worked) / sum(counts)
    return Run(sum(counts) / seconds, statistics.median(first - began for first, _ in found), cpu)


@contextmanager
def server(engine: str, store: str) -> Iterator[Doors]:
    """A server in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        http = probe.getsockname()[1]
    command = [sys.executable, "-m", "steer_server", "--model", MODEL, "--store", store, "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, "--http-port", str(http), *OPTIONS[engine]],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        target = ""
        for line in process.stderr or ():
            found = re.search(r"serving\s.*listen=(\S+)", line)
            if found:
                target = found[1]
                break
        if not target:
            raise SystemExit("the server did not start")
        # Lines that nobody reads would hold up the server.
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield Doors(target, http, psutil.Process(process.pid))
        process.terminate()
        process.wait(60)
        drain.wait(10)
    finally:
        process.kill()


async def measure(given: argparse.Namespace, doors: Doors) -> list[dict[str, Any]]:
    """Every arm in every round, in another order each time."""
    sizes = [int(size) for size in given.streams.split(",")]
    found: dict[tuple[int, str], list[Run]] = {(size, name): [] for size in sizes for name in ARMS}
    source = random.Random(0)
    for turn in range(-1, given.pairs):
        for size in sizes:
            for name in source.sample(list(ARMS), len(ARMS)):
                await asyncio.sleep(REST)
                result = await run(ARMS[name], doors, size, given.tokens, 1000 * (turn + 1))
                # The first round warms up.
                if turn >= 0:
                    found[size, name].append(result)
                print(f"round {turn + 1}, {size} streams, {name}: {result}", file=sys.stderr, flush=True)
    rows = []
    for (size, name), runs in found.items():
        pairs = list(zip(runs, found[size, "grpc"], strict=True))
        rows.append(
            {
                "streams": size,
                "arm": name,
                "rate": statistics.median(each.rate for each in runs),
                "first": statistics.median(each.first for each in runs),
                "rates": [one.rate / other.rate for one, other in pairs],
                "firsts": [other.first / one.first for one, other in pairs],
                "cpus": [other.cpu / one.cpu for one, other in pairs],
            }
        )
    return rows


def main() -> None:
    """Prints a table (or JSON) of rates and ratios."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--engine", choices=OPTIONS, default="hf")
    options.add_argument("--pairs", type=int, default=9)
    options.add_argument("--streams", default="1,16")
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        loaded = load_model(MODEL, dtype="float32")
        concept = concept_from_text("The Golden Gate Bridge in San", loaded)
        Store(Path(directory)).save("bridge", build_operator(BuildSpec((concept,), layer=15), loaded))
        del loaded
        with server(given.engine, directory) as doors:
            rows = asyncio.run(measure(given, doors))
    if given.json:
        print(json.dumps(rows))
        return
    print(f"engine {given.engine}, {given.pairs} rounds, {given.tokens} tokens; ratios: median (least to most)")
    print(
        f"{'streams':>7} {'arm':9} {'tokens/s':>9} {'ratio':>20} {'first, ms':>10} {'ratio':>20} {'ratio of CPU':>20}"
    )
    for row in rows:
        rate, first = f"{row['rate']:9.1f}", f"{1e3 * row['first']:10.1f}"
        rates, firsts, cpus = (
            f"{statistics.median(row[name]):.3f} ({min(row[name]):.3f}-{max(row[name]):.3f})"
            for name in ("rates", "firsts", "cpus")
        )
        print(f"{row['streams']:7} {row['arm']:9} {rate} {rates:>20} {first} {firsts:>20} {cpus:>20}")


if __name__ == "__main__":
    main()
