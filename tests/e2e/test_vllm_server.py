"""A real server on vLLM, asked by a real client in another process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from steer_client import OperatorUse, SamplingParams, SteerClient

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.defaults import PUBLISHED
from operators.core.store import Store
from tests.e2e.openai_parity import check_parity

pytestmark = [pytest.mark.model, pytest.mark.vllm]

BIN = Path(sys.executable).parent
OPTIONS = ("--engine", "vllm", "--engine-args", "enforce_eager=true", "--engine-args", "max_model_len=512")
PROMPT = "Here is a painting of the"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def bridges(smollm, tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm") / "store"
    loaded = smollm()
    concept = concept_from_text("The Golden Gate Bridge in San", loaded)
    Store(directory).save("bridge", build_operator(BuildSpec((concept,), layer=15, recommended=PUBLISHED), loaded))
    return directory


def test_a_server_on_vllm_answers_as_one_on_transformers_and_ends_when_its_engine_dies(
    bridges, start_server, free_ports
):
    uses, sampling = [OperatorUse("bridge", 0.4, blend=0.5)], SamplingParams(max_tokens=16)
    answers = {}
    for name, engine in {"hf": (), "vllm": OPTIONS}.items():
        [http] = free_ports(1)
        options = (*engine, "--http-port", str(http))
        with (
            start_server("--store", str(bridges), *options, model="smollm2-135m", metrics=True, timeout=300) as server,
            SteerClient(server.target, timeout=120) as client,
        ):
            assert client.model_info().engine == name
            check_parity(f"127.0.0.1:{http}", server.target, "bridge", chat=True)
            generated = client.generate(PROMPT, operators=uses, sampling=sampling)
            compared = client.compare(PROMPT, operators=uses, sampling=sampling)
            answers[name] = (generated.text, compared.normal.text, compared.steered["steered"].generation.text)
            kl = compared.steered["steered"].kl
            answers[name + " kl"] = (kl.mean, kl.p95)
            if name == "hf":
                continue
            assert client.health()
            with DIRECT.open(f"http://{server.metrics}/metrics", timeout=10) as page:
                exported = page.read().decode()
            assert "steer_positions_steered_total" in exported
            assert "vllm:generation_tokens_total" in exported
            for child in psutil.Process(server.process.pid).children(recursive=True):
                if "VLLM" in child.name() or "VLLM" in "".join(child.cmdline()):
                    child.kill()
            assert server.exit_code(60) == 3
            assert any("the engine died" in line for line in server.log)
    assert answers["vllm"] == answers["hf"]
    assert answers["vllm kl"] == pytest.approx(answers["hf kl"], abs=2e-3)


FORGETFUL = """
from steer_server.command import app
from steer_server.engine.vllm.client import VLLMClient

generate = VLLMClient.generate
VLLMClient.generate = lambda self, ids, params, settings, key, **options: generate(
    self, ids, params, () if key == "self-test-2" else settings, key, **options
)
app()
"""
"""A server that forgets the steering of one request of its self-test."""


def test_a_server_whose_self_test_fails_says_why_ends_and_never_serves(free_port):
    listen = ("--listen", f"127.0.0.1:{free_port}")
    process = subprocess.Popen(
        [sys.executable, "-c", FORGETFUL, *listen, *OPTIONS],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    said, states, end = [], set(), time.monotonic() + 300
    reading = threading.Thread(target=lambda: said.append(process.stderr.read()))
    reading.start()
    while process.poll() is None and time.monotonic() < end:
        # Its port is open from the start, and says that it loads.
        with grpc.insecure_channel(f"127.0.0.1:{free_port}") as channel, contextlib.suppress(grpc.RpcError):
            asked = health_pb2.HealthCheckRequest()
            states.add(health_pb2_grpc.HealthStub(channel).Check(asked, timeout=5).status)
        time.sleep(0.05)
    process.kill()
    reading.join(30)
    assert process.wait() == 1
    assert states == {health_pb2.HealthCheckResponse.NOT_SERVING}
    assert "steer-server: self-test: a request steered at layer 2 failed: no worker knows of it\n" in said[0]
