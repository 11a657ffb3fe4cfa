"""Whatever a caller sends or a store holds, the error is typed and names the thing, and the server goes on serving."""

import math
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from steer_client import (
    FinishReason,
    OperatorUnusableError,
    OperatorUse,
    SamplingParams,
    SteerClient,
)

from operators import store
from operators.artifact import to_bytes

BIN = Path(sys.executable).parent
GOLDEN = [OperatorUse("golden", 0.5)]
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)
LONG = SamplingParams(max_tokens=4000, ignore_eos=True)
"""Several seconds of work."""
OTHER = f"sha256:{'0' * 64}"


class _Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture(autouse=True)
def serves_afterwards(server):
    """After every test here: a normal request is served as ever, and nothing runs or waits."""
    yield
    with SteerClient(server.target, timeout=20) as client:
        result = client.generate("the golden gate", operators=GOLDEN, sampling=SHORT)
    assert result.finish_reason is FinishReason.MAX_TOKENS
    assert result.receipts[0].generated_tokens_steered == 3
    server.wait_for_jobs(0, 0)


@pytest.fixture(scope="module")
def trap(tmp_path_factory):
    return tmp_path_factory.mktemp("trap") / "sprung"


@pytest.fixture(scope="module")
def bad_store(server, tiny_store, tmp_path_factory, golden, remake, trap):
    """Puts one of every kind of bad artifact into the shared server's store; takes them away again."""
    good = to_bytes(golden)
    contents = {
        "other-model": to_bytes(remake(golden, model="somebody/else", model_fingerprint=OTHER)),
        "other-tokenizer": to_bytes(remake(golden, tokenizer_fingerprint=OTHER)),
        "other-depth": to_bytes(remake(golden, num_layers=9)),
        "other-shape": to_bytes(remake(golden, hidden_size=16)),
        "truncated": good[:-100],
        "flipped": good[:-50] + bytes([good[-50] ^ 4]) + good[-49:],
        "not-a-number": to_bytes(replace(golden, anchor=torch.full_like(golden.anchor, math.nan))),
        "pickled": pickle.dumps(_Bomb(trap), protocol=4),
        "empty": b"",
    }
    for name, data in contents.items():
        (tiny_store / f"{name}.safetensors").write_bytes(data)
    with (tiny_store / "oversized.safetensors").open("wb") as file:
        file.truncate((4 << 30) + 1)
    elsewhere = store.save(tmp_path_factory.mktemp("elsewhere"), "golden", golden)
    (tiny_store / "linked.safetensors").symlink_to(elsewhere)
    names = [*contents, "oversized", "linked"]
    with SteerClient(server.target, timeout=60) as client:
        report = client.reload_operators()
        assert set(report.unusable) == set(report.added) == set(names)
        yield
        for name in names:
            (tiny_store / f"{name}.safetensors").unlink()
        assert set(client.reload_operators().removed) == set(names)


@pytest.mark.usefixtures("bad_store")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other-model", "built for model somebody/else"),
        ("other-tokenizer", "built for tokenizer"),
        ("other-depth", "built for number of layers 9; this server has 4"),
        ("other-shape", "built for hidden size 16; this server has 32"),
        ("truncated", "not a whole safetensors file"),
        ("flipped", "it is damaged"),
        ("not-a-number", "not finite"),
        ("pickled", "pickle"),
        ("empty", "not a whole safetensors file"),
        ("oversized", "at most 4294967296 are read"),
        ("linked", "a symbolic link, which is not followed"),
    ],
)
def test_a_bad_artifact_is_listed_and_refused_with_its_problem(client, trap, name, words):
    info = client.operator(name)
    assert not info.usable
    assert words in info.problem
    for call in (
        lambda: client.generate("x", operators=[OperatorUse(name)]),
        lambda: client.compare("x", arms={"a": GOLDEN, "b": [OperatorUse(name)]}),
    ):
        with pytest.raises(OperatorUnusableError) as caught:
            call()
        assert repr(name) in str(caught.value)
        assert words in str(caught.value)
    assert not trap.exists()


def _run(command, *arguments, timeout=60):
    began = time.monotonic()
    done = subprocess.run([BIN / command, *arguments], capture_output=True, text=True, timeout=timeout, check=False)
    return done, time.monotonic() - began


def _only_line(done, command):
    """The one line that says what is wrong; log lines may come before it, a traceback may not."""
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith(f"{command}:"))
    assert done.stderr.splitlines()[-1] == line
    return line


def test_a_concept_of_one_token_builds_and_steers(client, tiny_model, tiny_store, loaded):
    assert len(loaded.tokenizer("g")["input_ids"]) == 1
    built, _ = _run("steer-operators", "build", "letter", "--text", "g", "--model", tiny_model, "--store", tiny_store)
    assert built.returncode == 0, built.stderr
    assert client.reload_operators().added == ("letter",)
    assert client.operator("letter").positions == 1
    result = client.generate("the bay", operators=[OperatorUse("letter", 0.5)], sampling=SHORT)
    assert result.receipts[0].generated_tokens_steered == 3
    assert result.receipts[0].mean_dose == pytest.approx(0.25, abs=1e-4)
    store.delete(tiny_store, "letter")
    assert client.reload_operators().removed == ("letter",)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_a_concept_of_no_tokens_is_an_error(tiny_model, tmp_path, text):
    done, _ = _run("steer-operators", "build", "nothing", "--text", text, "--model", tiny_model, "--store", tmp_path)
    assert done.returncode == 1
    assert "no tokens" in _only_line(done, "steer-operators")
    assert list(tmp_path.iterdir()) == []
