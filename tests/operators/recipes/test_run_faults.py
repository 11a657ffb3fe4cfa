"""``build --file`` where something goes wrong on the way: the others are built, and the next run goes on."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch

from operators.builder import build
from operators.core.store import Store

ONE = '[[concept]]\nname = "a"\ntext = "golden gate"\nrank = 5\n'


def _statuses(result):
    return {one["name"]: one["status"] for one in json.loads(result.stdout)["operators"]}


def _snapshot(directory):
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in directory.iterdir()}


@pytest.fixture
def overflowing(tiny, tmp_path):
    """A model whose second block gives values that are not finite."""
    loaded = tiny("llama", dtype="float32", fresh=True)
    loaded.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    loaded.model.save_pretrained(tmp_path / "overflowing")
    loaded.tokenizer.save_pretrained(tmp_path / "overflowing")
    return str(tmp_path / "overflowing")


def test_a_concept_that_fails_does_not_lose_the_others(build_file, shelf, overflowing):
    text = '[[concept]]\nname = "a"\ntext = "The old bay"\nlayers = [3, 1]\n'
    text += '[[concept]]\nname = "b"\ntext = "The Golden Gate"\nlayer = 1\n'
    result = build_file(text, "--model", overflowing)
    assert result.exit_code == 1
    said = f"the hidden state of 'The old bay' at layer 3 of {overflowing} is not finite in float32"
    assert re.fullmatch(rf"a-layer3  failed +[\d.]+ s  {said}", result.stdout.splitlines()[0])
    assert result.stdout.splitlines()[-1].startswith("2 built, 1 failed: ")
    assert result.stderr == f"steer-operators: a-layer3: {said}\n"
    assert Store(shelf).names() == ["a-layer1", "b"]
    again = build_file(text, "--model", overflowing, "--json")
    assert (again.exit_code, again.stderr) == (1, "")
    failed, *others = json.loads(again.stdout)["operators"]
    assert failed["problem"] == {"type": "ReconstructionError", "message": said}
    assert [one["status"] for one in others] == ["up to date"] * 2


def test_a_full_disk_loses_only_what_does_not_fit(build_file, shelf):
    text = (
        ONE
        + '[[concept]]\nname = "large"\ntext = "The Golden Gate Bridge"\nrank = "full"\n'
        + ONE.replace('"a"', '"b"')
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        result = build_file(text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1
    assert result.stderr == (f"steer-operators: large: operator 'large' cannot be written to {shelf}: File too large\n")
    assert sorted(os.listdir(shelf)) == ["a.safetensors", "b.safetensors"]
    assert _statuses(build_file(text, "--json")) == {"a": "up to date", "large": "built", "b": "up to date"}


def _ask_torch_for_too_much(*_args, **_kwargs):
    torch.empty(1 << 50)


def _ask_python_for_too_much(*_args, **_kwargs):
    bytearray(1 << 60)


@pytest.mark.parametrize("fail", [_ask_torch_for_too_much, _ask_python_for_too_much])
def test_an_operator_that_memory_does_not_hold_is_a_failed_one(build_file, shelf, monkeypatch, fail):
    make = build.build_operator
    monkeypatch.setattr(
        "operators.recipes.run.build_operator",
        lambda spec, *args, **kwargs: (fail if spec.rank == 5 else make)(spec, *args, **kwargs),
    )
    result = build_file(ONE + ONE.replace('"a"', '"b"').replace("5", "4"))
    assert result.exit_code == 1
    assert re.match(r"steer-operators: a: there is not enough memory(: \d+ bytes more are needed)?; a l", result.stderr)
    assert Store(shelf).names() == ["b"]


@pytest.mark.parametrize("fail", [_ask_torch_for_too_much, _ask_python_for_too_much])
@pytest.mark.parametrize("place", ["embedding_root", "Store.save", "with_header"])
def test_memory_that_runs_out_anywhere_in_a_task_fails_that_task_alone(build_file, monkeypatch, place, fail):
    two = ONE + ONE.replace('"a"', '"b"')
    if place == "with_header":
        # What is there is rewritten.
        build_file(two)
        two = two.replace("rank", "strength = 0.4\nrank")
    monkeypatch.setattr(f"operators.recipes.run.{place}", fail)
    result = build_file(two)
    assert result.exit_code == 1
    assert "2 failed" in result.stdout
    for name in "ab":
        assert f"steer-operators: {name}: there is not enough memory" in result.stderr


def test_an_operator_that_failed_keeps_no_memory_from_the_next(build_file, monkeypatch):
    make, kept = build.build_operator, []

    def fail(spec, *args, **kwargs):
        if spec.rank == 5:
            numbers = torch.zeros(8)
            kept.append(weakref.ref(numbers))
            raise MemoryError
        assert kept[0]() is None
        return make(spec, *args, **kwargs)

    monkeypatch.setattr("operators.recipes.run.build_operator", fail)
    assert _statuses(build_file(ONE + ONE.replace('"a"', '"b"').replace("5", "4"), "--json"))["b"] == "built"


def test_a_programming_error_is_not_an_operator_that_failed(build_file, monkeypatch):
    def wrong(*_args, **_kwargs):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr("operators.recipes.run.build_operator", wrong)
    with pytest.raises(RuntimeError, match="size mismatch"):
        build_file(ONE)


def test_an_interrupted_run_keeps_what_is_finished_and_goes_on_when_run_again(
    build_file, shelf, tiny_directory, tmp_path
):
    # The signal is the command's own: a shell may have told its children to ignore it.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from operators.__main__ import main; main()"
    )
    text = "".join(ONE.replace('"a"', f'"a{number}"') for number in range(400))
    (tmp_path / "many.toml").write_text(text)
    command = [sys.executable, "-c", program, "build", "--file", "many.toml"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONUNBUFFERED": ""}, **streams) as process:
        try:
            assert process.stdout.readline().startswith("a0 ")
            # It was told when it was finished, not with many others.
            assert len(os.listdir(shelf)) < 100
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    done = Store(shelf).names()
    # One may have been written and not told.
    told = 1 + len(output.splitlines())
    assert told <= len(done) <= told + 1 < 400
    assert f"of 400 operators are in {shelf}" in errors
    assert sorted(os.listdir(shelf)) == [f"{name}.safetensors" for name in done]
    before = _snapshot(shelf)
    text = "".join(ONE.replace('"a"', f'"a{number}"') for number in range(len(done) + 2))
    statuses = _statuses(build_file(text, "--json"))
    assert {name for name, status in statuses.items() if status == "up to date"} == set(done)
    assert list(statuses.values()).count("built") == 2
    assert before.items() <= _snapshot(shelf).items()
