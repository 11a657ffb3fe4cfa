"""The bound of memory against what a process of its own takes (tests/bench/bench_memory.py has the default model)."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from operators.builder.memory import estimate_sketch
from operators.maps.replay import Replay
from operators.model.loading import LoadedModel
from tests.odd_models import odd_model

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


@pytest.mark.parametrize(("name", "inner"), [("llama", 42), ("mixtral", 2 * 29), ("gpt_oss", 2 * 2 * 29)])
def test_what_is_kept_of_a_token_is_counted_for_a_mixture_too(name, inner, tiny_tokenizer):
    model = odd_model(name)
    loaded = LoadedModel(name, model, tiny_tokenizer, "", "")
    replay = Replay(model, (77, 12, 90, 65), layer=4, profile="residual")
    kept = [factor for factor in replay._tape._factors.values() if factor.ndim == 3]
    assert max(factor.shape[-1] for factor in kept) <= inner
    one, two = (estimate_sketch(loaded, 1, layer, 1).per_row for layer in (1, 4))
    assert one == two
    # 4 inner layers wide, 6 streams wide and as many weights as heads, in float64.
    assert one == math.ceil(1.1 * 8 * (4 * inner + 6 * 42 + 3))
