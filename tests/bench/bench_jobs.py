"""Many concepts of one file: ``steer-operators build --file --jobs N`` against one by one.

    python tests/bench/bench_jobs.py [--concepts 64] [--rank 8] [--jobs 1 2] [--rounds 1]

Each run is the whole command in a process of its own, into an empty store: seconds by the clock, and CPU seconds (user
and system) of the command and all its workers. N workers share the threads that one process has, so that two cores are
two threads of one, or one of each of two. The order alternates from round to round. The concepts are texts of five
words. Not a test; nothing here passes or fails. Run it on a quiet machine, or by CPU seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ("ocean", "tea", "wedding", "bridge", "winter", "music", "horse", "garden", "money", "doctor", "train", "paper")


def main() -> None:
    """Prints a line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    pairs = itertools.islice(itertools.permutations(WORDS, 2), options.concepts)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "many.toml")
        file.write_text(
            "".join(
                f'[[concept]]\nname = "c{index}"\ntext = "The {one} and the {other}"\nrank = {options.rank}\n'
                for index, (one, other) in enumerate(pairs)
            )
        )
        for number in range(options.rounds):
            for jobs in options.jobs[:: -1 if number % 2 else 1]:
                run(file, Path(directory, f"store-{number}-{jobs}"), jobs)


def run(file: Path, store: Path, jobs: int) -> None:
    """One command, and what it took."""
    start, before = time.monotonic(), cpu_seconds()
    command = [sys.executable, "-m", "operators", "build", "--file", str(file), "--store", str(store), "--json"]
    done = subprocess.run([*command, "--jobs", str(jobs)], check=True, capture_output=True, text=True)
    statuses = [one["status"] for one in json.loads(done.stdout)["operators"]]
    seconds = time.monotonic() - start
    cpu, load = cpu_seconds() - before, os.getloadavg()[0]
    built = statuses.count("built")
    print(f"--jobs {jobs}: {built} built in {seconds:.1f} s, {cpu:.1f} CPU seconds (load {load:.1f})", flush=True)


def cpu_seconds() -> float:
    """User and system time of all commands that have ended, and of the processes that these waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
