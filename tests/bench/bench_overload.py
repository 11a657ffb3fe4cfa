"""What a server at twice its capacity does: latency of what it accepts, of what it refuses, and what is left over.

    python tests/bench/bench_overload.py
    python tests/bench/bench_overload.py --seconds 300 --tokens 16 --json

The server runs here, on a random model of four layers with an operator; every text is steered. Its capacity is what it
answers per second when its queue is never empty. Then texts are asked for at that rate and at twice that, at random
moments that do not wait for answers, by a client that does not try again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
from fuzz_model import make_model_and_store
from fuzz_server import _target
from steer_client import AsyncSteerClient, OperatorUse, SamplingParams, SteerError

_IN_FLIGHT = 32
_QUICKEST = 0.05
"""Seconds, at the 99th percentile, that a refusal may take."""


async def main() -> None:
    """Prints what was measured; exit status 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="of overload; the other phases take a fifth each")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, store = make_model_and_store(Path(folder))
        command = [str(Path(sys.executable).parent / "steer-server"), "--model", str(model), "--store", str(store)]
        with open(Path(folder) / "log", "w+") as log:
            server = subprocess.Popen(
                [*command, "--listen", "127.0.0.1:0", "--log-format", "json"],
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            try:
                found = await _measure(_target(server, Path(folder) / "log"), options.seconds, options.tokens)
            finally:
                server.terminate()
                found_exit = server.wait(30)
    found["exit"] = found_exit
    print(json.dumps(found, indent=None if options.json else 2))
    if not found["met"] or found_exit:
        sys.exit(1)


async def _measure(target: str, seconds: float, tokens: int) -> dict[str, Any]:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    async with AsyncSteerClient(target, timeout=60, retry=False) as client:
        name = next(each.name for each in await client.operators() if not each.problem)

        async def ask(outcomes: list[tuple[str, float]]) -> None:
            began = time.monotonic()
            try:
                await client.generate("the golden gate", operators=[OperatorUse(name, 0.5)], sampling=sampling)
                outcome = "OK"
            except SteerError as error:
                outcome = error.code.name if isinstance(error.code, grpc.StatusCode) else type(error).__name__
            outcomes.append((outcome, time.monotonic() - began))

        async def never_empty(outcomes: list[tuple[str, float]], until: float) -> None:
            while time.monotonic() < until:
                await ask(outcomes)

        async def at_rate(rate: float, length: float) -> list[tuple[str, float]]:
            outcomes: list[tuple[str, float]] = []
            draw, tasks = random.Random(1), set()
            due = time.monotonic()
            until = due + length
            while due < until:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.add(task := asyncio.create_task(ask(outcomes)))
                task.add_done_callback(tasks.discard)
                due += draw.expovariate(rate)
            await asyncio.gather(*tasks)
            return outcomes

        for _ in range(5):
            await ask([])
        full: list[tuple[str, float]] = []
        until = time.monotonic() + seconds / 5
        await asyncio.gather(*(never_empty(full, until) for _ in range(_IN_FLIGHT)))
        capacity = sum(outcome == "OK" for outcome, _ in full) / (seconds / 5)
        alone: list[tuple[str, float]] = []
        await ask(alone)
        at_capacity = await at_rate(capacity, seconds / 5)
        over = await at_rate(2 * capacity, seconds)
        afterwards: list[tuple[str, float]] = []
        await ask(afterwards)
    found: dict[str, Any] = {
        "capacity per second": round(capacity, 1),
        "at capacity": _summary(at_capacity),
        "at twice that": _summary(over),
        "one text before and after, ms": [round(1000 * each[0][1], 1) for each in (alone, afterwards)],
    }
    accepted = found["at twice that"]["OK"]["p99 ms"] / found["at capacity"]["OK"]["p99 ms"]
    refused = found["at twice that"].get("RESOURCE_EXHAUSTED", {"p99 ms": 0.0})["p99 ms"]
    found["accepted, p99 over that at capacity"] = round(accepted, 2)
    found["met"] = (
        accepted <= 2
        and refused < 1000 * _QUICKEST
        and not {*found["at twice that"]}
        - {
            "OK",
            "RESOURCE_EXHAUSTED",
        }
    )
    return found


def _summary(outcomes: list[tuple[str, float]]) -> dict[str, dict[str, float]]:
    summary = {}
    for outcome, count in Counter(outcome for outcome, _ in outcomes).most_common():
        times = sorted(1000 * seconds for each, seconds in outcomes if each == outcome)
        quantiles = {f"p{share} ms": round(times[int(share / 100 * (count - 1))], 1) for share in (50, 99)}
        summary[outcome] = {"count": count, **quantiles}
    return summary


if __name__ == "__main__":
    asyncio.run(main())
