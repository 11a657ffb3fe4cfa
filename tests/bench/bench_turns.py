"""How long a text of 4 tokens takes: alone, beside one of 2,000 tokens, and beside a full queue of another client's.

    python tests/bench/bench_turns.py [--model smollm2-135m]

Server and clients are processes of their own.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steer_client import SamplingParams, SteerClient

_OTHER = """
import sys, threading
from steer_client import SamplingParams, SteerClient
target, count, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
client = SteerClient(target, timeout=None)
def ask():
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    while True:
        for _ in client.stream("Once upon a time", sampling=sampling):
            print("token", flush=True)
for _ in range(count):
    threading.Thread(target=ask, daemon=True).start()
threading.Event().wait()
"""


@contextmanager
def _server(model: str) -> Iterator[str]:
    command = [Path(sys.executable).parent / "steer-server", "--model", model, "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stderr.readline, "")  # type: ignore[union-attr]
            yield next(found[1] for line in lines if (found := re.search(r"listen=(\S+)", line)))
        finally:
            process.kill()


@contextmanager
def _other_client(target: str, count: int) -> Iterator[None]:
    """Another client with so many texts of 2,000 tokens under way, the first of which has begun."""
    command = [sys.executable, "-c", _OTHER, target, str(count), "2000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()  # type: ignore[union-attr]
            time.sleep(2)
            yield
        finally:
            process.kill()


def _times(client: SteerClient, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        client.generate("The capital of France is", sampling=SamplingParams(max_tokens=4, ignore_eos=True))
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with _server(options.model) as target, SteerClient(target, timeout=300) as client:
        _times(client, 2)
        rows = {"alone": _times(client, options.repeats)}
        for name, count in (("beside one text of 2,000 tokens", 1), ("beside a full queue of another client", 32)):
            with _other_client(target, count):
                rows[name] = _times(client, options.repeats)
        for name, times in rows.items():
            print(f"{name:40} median {statistics.median(times):.2f} s, longest {max(times):.2f} s")


if __name__ == "__main__":
    main()
