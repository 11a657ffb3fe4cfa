"""Commands that cannot do what they are asked say so in one line, and leave a running server alone."""

import socket
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
from transformers import BertConfig, BertLMHeadModel

from operators.core.store import Store

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
    [
        ("engine", "warp"),
        ("dtype", "float8"),
        ("device", "abacus"),
        ("metrics_port", "70000"),
        ("max_queue", "0"),
        ("max_dose", "0"),
        ("operator_memory", "much"),
    ],
)
def test_a_setting_that_is_not_accepted_ends_the_server_at_once(option, value):
    done, seconds = _run("steer-server", f"--{option.replace('_', '-')}", value)
    assert done.returncode == 2
    assert seconds < 20
    assert option in _only_line(done, "steer-server")


def test_an_address_without_a_port_ends_the_server_at_once():
    done, seconds = _run("steer-server", "--listen", "127.0.0.1")
    assert done.returncode == 2
    assert seconds < 20
    assert "listen" in _only_line(done, "steer-server")


def test_a_model_without_decoder_layers_ends_the_server_with_one_line(tiny_tokenizer, tmp_path):
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        is_decoder=True,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    options = ("--model", tmp_path / "model", "--listen", "127.0.0.1:0", "--store", tmp_path)
    done, seconds = _run("steer-server", *options)
    assert done.returncode == 1
    assert seconds < 60
    line = _only_line(done, "steer-server")
    assert str(tmp_path / "model") in line
    assert "BertLMHeadModel" in line


def test_a_store_that_is_a_file_ends_the_server_with_one_line(tiny_model, tmp_path):
    (tmp_path / "store").write_text("no directory")
    options = ("--model", tiny_model, "--listen", "127.0.0.1:0", "--store", tmp_path / "store")
    done, _ = _run("steer-server", *options)
    assert done.returncode == 1
    assert "is not a directory" in _only_line(done, "steer-server")


def test_a_store_that_is_not_there_ends_the_server_before_it_loads_a_model(tmp_path):
    done, _ = _run("steer-server", "--model", "no-such-model-xyz", "--store", tmp_path / "stroe")
    assert done.returncode == 1
    assert f"store {tmp_path / 'stroe'} does not exist" in _only_line(done, "steer-server")


def test_a_taken_port_for_metrics_ends_the_server_before_it_loads_a_model(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = ("--listen", "127.0.0.1:0", "--metrics-port", str(port), "--store", tmp_path)
        done, _ = _run("steer-server", "--model", "no-such-model-xyz", *options)
    assert done.returncode == 1
    line = _only_line(done, "steer-server")
    assert "--metrics-port" in line
    assert str(port) in line


def test_a_concept_of_one_token_builds_and_steers(client, tiny_model, tiny_store, loaded):
    assert len(loaded.tokenizer("g")["input_ids"]) == 1
    built, _ = _run("steer-operators", "build", "letter", "--text", "g", "--model", tiny_model, "--store", tiny_store)
    assert built.returncode == 0, built.stderr
    assert client.reload_operators().added == ("letter",)
    assert client.operator("letter").positions == 1
    result = client.generate("the bay", operators=[OperatorUse("letter", 0.5)], sampling=SHORT)
    assert result.receipts[0].generated_tokens_steered == 3
    assert result.receipts[0].mean_dose == pytest.approx(0.25, abs=1e-4)
    Store(tiny_store).delete("letter")
    assert client.reload_operators().removed == ("letter",)


def test_a_concept_of_no_tokens_is_an_error(tiny_model, tmp_path):
    done, _ = _run("steer-operators", "build", "nothing", "--text", "", "--model", tiny_model, "--store", tmp_path)
    assert done.returncode == 2
    assert "no tokens" in _only_line(done, "steer-operators")
    assert list(tmp_path.iterdir()) == []
