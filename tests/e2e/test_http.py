"""A real server's door for HTTP, beside gRPC."""

from __future__ import annotations

import json
import urllib.request

import pytest
from steer_client import OperatorUse, SamplingParams, SteerClient

PROMPT = "the golden gate"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def served(start_tiny, free_ports):
    """A server, and the address of its door."""
    [port] = free_ports(1)
    with start_tiny("--http-port", str(port)) as running:
        assert any(f"http=127.0.0.1:{port}" in line for line in running.log)
        yield running, f"http://127.0.0.1:{port}"
        running.signal()
        assert running.exit_code(20) == 0


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with DIRECT.open(request, timeout=60) as answer:
        return answer.read().decode()


def test_a_steered_stream_as_json_is_that_over_grpc(served):
    server, door = served
    sampling = {"max_tokens": 12, "temperature": 1.0, "seed": "7", "ignore_eos": True}
    operators = [{"name": "golden", "strength": 0.5, "blend": 0.25}]
    body = {"prompt": {"text": PROMPT}, "sampling": sampling, "operators": operators}
    events = [json.loads(line[6:]) for line in post(f"{door}/api/GenerateStream", body).splitlines() if line]
    finished = events[-1]["finished"]
    with SteerClient(server.target, timeout=60) as client:
        uses = [OperatorUse("golden", 0.5, blend=0.25)]
        params = SamplingParams(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True)
        over_grpc = client.generate(PROMPT, operators=uses, sampling=params)
    assert tuple(finished["token_ids"]) == over_grpc.token_ids
    assert "".join(event["delta"]["text"] for event in events if "delta" in event) == over_grpc.text
    [receipt] = finished["receipts"]
    assert (receipt["operator"], receipt["digest"]) == ("golden", over_grpc.receipts[0].digest)
    assert receipt["generated_tokens_steered"] == 11
