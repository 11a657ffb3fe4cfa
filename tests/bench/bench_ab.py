"""How long an A/B takes in one batch, against its two texts asked for one after the other.

    python tests/bench/bench_ab.py [--pairs 7] [--tokens 48] [--json]

Starts a server per dtype, runs both ways in turn, and reports the ratio pair by pair: machines drift, and a ratio of
neighbours drifts least. Scoring (KL) is off unless --score is given. Not a test; nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steer_client import OperatorUse, SamplingParams, SteerClient

BIN = Path(sys.executable).parent
PROMPT = "Here is a painting of the"
USES = [OperatorUse("bridge", 0.4, blend=0.5)]


def main() -> None:
    """Prints a table (or JSON) of seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--score", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        build = [BIN / "steer-operators", "build", "bridge", "--text", "The Golden Gate Bridge in San Francisco"]
        subprocess.run([*build, "--layer", "15", "--store", store], check=True, stdout=subprocess.DEVNULL)
        results = {
            dtype: measure(dtype, store, options.pairs, options.tokens, options.score)
            for dtype in ("bfloat16", "float32")
        }
    if options.json:
        print(json.dumps(results))
        return
    print(f"{options.pairs} pairs of {options.tokens} tokens per text, scoring {'on' if options.score else 'off'}")
    print(f"{'dtype':10} {'A/B, s':>8} {'in turn, s':>11} {'ratio: min':>11} {'median':>7} {'max':>6}")
    for dtype, timings in results.items():
        ratios = timings["ratios"]
        print(
            f"{dtype:10} {statistics.median(timings['batched']):8.2f} {statistics.median(timings['in_turn']):11.2f} "
            f"{min(ratios):11.2f} {statistics.median(ratios):7.2f} {max(ratios):6.2f}"
        )


def measure(dtype: str, store: str, pairs: int, tokens: int, score: bool) -> dict[str, list[float]]:
    """Seconds of both variants and their ratios, pair by pair."""
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    batched, in_turn = [], []
    with server(dtype, store) as target, SteerClient(target) as client:

        def one_batch() -> None:
            result = client.compare(PROMPT, operators=USES, sampling=sampling, score=score)
            assert len(result.normal.token_ids) == len(result.steered["steered"].generation.token_ids) == tokens

        def two_calls() -> None:
            client.generate(PROMPT, sampling=sampling)
            client.generate(PROMPT, operators=USES, sampling=sampling)

        one_batch()
        two_calls()
        for pair in range(pairs):
            # The order alternates, so that neither always runs on the warmer machine.
            for run, seconds in ((one_batch, batched), (two_calls, in_turn))[:: 1 if pair % 2 else -1]:
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
    return {
        "batched": batched,
        "in_turn": in_turn,
        "ratios": [a / b for a, b in zip(batched, in_turn, strict=True)],
    }


@contextmanager
def server(dtype: str, store: str) -> Iterator[str]:
    """A server of its own on a free port."""
    command = [BIN / "steer-server", "--dtype", dtype, "--store", store, "--listen", "127.0.0.1:0"]
    process = subprocess.Popen([*command, "--log-format", "json"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r'"listen": "([^"]+)".*"event": "serving"', line):
                yield found[1]
                break
        else:
            sys.exit("bench: the server did not start")
    finally:
        process.terminate()
        process.communicate(timeout=30)


if __name__ == "__main__":
    main()
