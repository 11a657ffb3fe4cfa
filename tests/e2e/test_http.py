"""A real server's door for HTTP, beside gRPC."""

from __future__ import annotations

import json
import urllib.request

import openai
import pytest
from steer_client import OperatorUse, SamplingParams, SteerClient

from tests.e2e.openai_parity import check_parity, client_of

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


def test_an_unmodified_openai_client_gets_the_texts_that_the_sdk_gets(served):
    server, door = served
    check_parity(door.removeprefix("http://"), server.target, "golden", chat=True)


def model_of(asked):
    return asked.models.list().data[0].id


def test_an_openai_client_meets_errors_that_it_knows(served):
    _, door = served
    with client_of(door.removeprefix("http://")) as asked:
        with pytest.raises(openai.BadRequestError, match="temperature") as caught:
            asked.completions.create(model=model_of(asked), prompt="x", temperature=-1)
        assert (caught.value.code, caught.value.param) == ("INVALID_REQUEST", "temperature")
        with pytest.raises(openai.NotFoundError, match="gpt-4"):
            asked.completions.create(model="gpt-4", prompt="x")
        with pytest.raises(openai.NotFoundError, match="there are: dress, golden") as caught:
            asked.completions.create(model=f"{model_of(asked)}+tide=0.4", prompt="x")
        assert caught.value.code == "UNKNOWN_OPERATOR"
