"""From a control vector file to steered text, through the commands and a real server."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from steer_client import InvalidRequestError, OperatorUse, SamplingParams, SteerClient

from operators.vectors.gguf_file import ControlVector, write_control_vector

BIN = Path(sys.executable).parent
SHORT = SamplingParams(max_tokens=6, ignore_eos=True)


def _run(command, *arguments, **environment):
    done = subprocess.run(
        [BIN / command, *map(str, arguments)],
        env=os.environ | {"COLUMNS": "120"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def vector(server, tiny_store, tiny_model, tmp_path_factory):
    """Puts ``happy`` into the shared server's store; takes it away again."""
    file = tmp_path_factory.mktemp("vector") / "happy.gguf"
    direction = np.random.default_rng(3).standard_normal(32).astype(np.float32)
    write_control_vector(file, ControlVector("llama", {1: direction}))
    options = ("--about", "happy, not sad", "--strength", "0.9", "--model", tiny_model, "--store", tiny_store)
    _run("steer-operators", "import", "happy", file, *options)
    with SteerClient(server.target, timeout=60) as client:
        assert client.reload_operators().added == ("happy",)
        yield
        (tiny_store / "happy.safetensors").unlink()
        client.reload_operators()


def test_a_request_is_steered_by_it_and_has_a_receipt(vector, client, server):
    info = client.operator("happy")
    assert (info.vector, info.rank, info.injection_layer, info.concept) == (True, 0, 2, "happy, not sad")
    result = client.compare("the golden gate", operators=[OperatorUse("happy")], sampling=SHORT)
    steered = result.steered["steered"].generation
    (receipt,) = steered.receipts
    assert (receipt.digest, receipt.layer, receipt.blend, receipt.dose_bound) == (info.digest, 2, 1.0, 0.45)
    assert receipt.mean_dose == pytest.approx(0.45, abs=1e-4)
    assert receipt.generated_tokens_steered == 5
    assert steered.token_ids != result.normal.token_ids
    shown = _run("steer", "operators", "happy", STEER_TARGET=server.target)
    assert "0: a vector at hidden size 32" in shown
    assert "vector" in _run("steer", "operators", STEER_TARGET=server.target)


def test_it_is_used_beside_a_map(vector, client):
    uses = [OperatorUse("happy", 0.4), OperatorUse("golden", 0.6)]
    first, second = client.generate("the bay", operators=uses, sampling=SHORT).receipts
    assert first.dose_bound == second.dose_bound == pytest.approx(0.5)


def test_another_blend_is_an_invalid_request_that_names_the_field(vector, client):
    with pytest.raises(InvalidRequestError, match=r"operators\[0\]\.blend: is 0\.5; operator 'happy' is a vector"):
        client.generate("x", operators=[OperatorUse("happy", blend=0.5)], sampling=SHORT)
