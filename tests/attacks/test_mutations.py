"""Whatever is changed in an operator's file or in a model's weights is noticed."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from operators.core.artifact import to_bytes
from operators.core.store import Store
from operators.model.loading import load_model


@pytest.fixture(scope="module")
def bench():
    """The module of the bench, which tries more of the same on the default model."""
    path = Path(__file__).parents[1] / "bench/bench_mutations.py"
    spec = importlib.util.spec_from_file_location("bench_mutations", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["operator", "vector", "lens"])
def data(request, make_operator, make_rank_0, make_random_lens, tiny):
    made = {
        "operator": lambda: make_operator(neutral=True),
        "vector": lambda: make_rank_0(40),
        "lens": lambda: make_random_lens(tiny("llama")),
    }
    return to_bytes(made[request.param]())


def test_every_damaged_file_is_refused(bench, data):
    assert not bench.is_refused(data)
    accepted = [
        (kind, damaged) for kind, damaged in bench.mutations(data, 400, seed=1) if not bench.is_refused(damaged)
    ]
    assert accepted == []


def test_every_value_of_every_byte_behind_the_header_is_refused(bench, make_operator):
    data = to_bytes(make_operator(1, 3))
    end = 8 + int.from_bytes(data[:8], "little")
    others = [
        data[:place] + bytes([value]) + data[place + 1 :]
        for place in range(end - 9, end)
        for value in range(256)
        if value != data[place]
    ]
    assert all(map(bench.is_refused, others))


def test_one_changed_number_anywhere_in_a_checkpoint_makes_its_operators_unusable(bench, tiny_directory, tmp_path):
    directory = shutil.copytree(tiny_directory("llama"), tmp_path / "model")
    store = Store(tmp_path / "store")
    store.save("bridge", bench.built(load_model(str(directory))))
    for seed in range(12):
        where, [problem] = bench.refusals(directory, store, seed=seed)
        assert "built for model" in problem, where
