"""Whatever a caller sends or a store holds, the error is typed and names the thing, and the server goes on serving."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from steer_client import (
    FinishReason,
    OperatorUse,
    SamplingParams,
    SteerClient,
)

BIN = Path(sys.executable).parent
GOLDEN = [OperatorUse("golden", 0.5)]
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)
LONG = SamplingParams(max_tokens=4000, ignore_eos=True)
"""Several seconds of work."""
OTHER = f"sha256:{'0' * 64}"


@pytest.fixture(autouse=True)
def serves_afterwards(server):
    """After every test here: a normal request is served as ever, and nothing runs or waits."""
    yield
    with SteerClient(server.target, timeout=20) as client:
        result = client.generate("the golden gate", operators=GOLDEN, sampling=SHORT)
    assert result.finish_reason is FinishReason.MAX_TOKENS
    assert result.receipts[0].generated_tokens_steered == 3
    server.wait_for_jobs(0, 0)


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


def test_an_unknown_model_ends_the_server_with_one_line(tmp_path):
    done, seconds = _run("steer-server", "--model", "no-such-model-xyz", "--listen", "127.0.0.1:0", "--store", tmp_path)
    assert done.returncode == 1
    assert seconds < 30
    assert "'no-such-model-xyz'" in _only_line(done, "steer-server")


def test_a_port_in_use_ends_the_second_server_with_one_line(server, tiny_model, tiny_store):
    done, _ = _run("steer-server", "--model", tiny_model, "--store", tiny_store, "--listen", server.target)
    assert done.returncode == 1
    assert server.target in _only_line(done, "steer-server")


@pytest.mark.parametrize(
    ("option", "value"),
    [("engine", "warp"), ("dtype", "float8"), ("device", "abacus"), ("metrics_port", "70000"), ("max_queue", "0")],
)
def test_a_setting_that_is_not_accepted_ends_the_server_at_once(option, value):
    done, seconds = _run("steer-server", f"--{option.replace('_', '-')}", value)
    assert done.returncode == 2
    assert seconds < 20
    assert option in _only_line(done, "steer-server")
