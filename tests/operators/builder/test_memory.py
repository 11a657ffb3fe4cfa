"""The bound of memory against what a process of its own takes (tests/bench/bench_memory.py has the default model)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench/bench_memory.py"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from Linux's /proc")
def test_a_build_stays_within_the_least_memory_that_is_accepted():
    command = [sys.executable, str(BENCH), "--model", "random", "--tokens", "512", "--dtypes", "float32"]
    ran = subprocess.run([*command, "--rank", "16", "--layer", "7", "--json"], capture_output=True, text=True)
    found = json.loads(ran.stdout)
    assert found["peak"] <= found["bound"]
    assert ran.returncode == 0, ran.stderr
    # The bound says something: it is not many times what is taken.
    assert found["peak"] > found["bound"] / 2
