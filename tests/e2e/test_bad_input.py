"""Whatever a caller sends or a store holds, the error is typed and names the thing, and the server goes on serving."""

import math
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from steer_client import (
    Chat,
    ChatMessage,
    DeadlineExceededError,
    FinishReason,
    InvalidRequestError,
    OperatorUnusableError,
    OperatorUse,
    PromptTooLongError,
    RequestCancelledError,
    SamplingParams,
    ServerBusyError,
    ServerError,
    SteerClient,
    UnknownOperatorError,
)
from steering.v1 import generation_pb2 as pb
from steering.v1 import generation_pb2_grpc

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


@pytest.mark.parametrize(
    ("arguments", "kind", "field", "words"),
    [
        ({"prompt": ""}, InvalidRequestError, "prompt.text", "empty"),
        ({"prompt": []}, InvalidRequestError, "prompt.token_ids", "empty"),
        ({"prompt": Chat(())}, InvalidRequestError, "prompt.chat", "empty"),
        ({"prompt": "the bay " * 4096}, PromptTooLongError, "prompt", "4095"),
        ({"prompt": [5] * 4096}, PromptTooLongError, "prompt", "4096 tokens"),
        ({"prompt": [3, 100_000]}, InvalidRequestError, "prompt.token_ids[1]", "100000"),
        ({"prompt": [-1]}, InvalidRequestError, "prompt.token_ids[0]", "-1"),
        ({"operators": [OperatorUse("golden", math.nan)]}, InvalidRequestError, "operators[0].strength", "strength: is nan"),
        ({"operators": [OperatorUse("golden", math.inf)]}, InvalidRequestError, "operators[0].strength", "strength: is inf"),
        ({"operators": [OperatorUse("golden", -math.inf)]}, InvalidRequestError, "operators[0].strength", "strength: is -inf"),
        ({"operators": [OperatorUse("golden", blend=1.5)]}, InvalidRequestError, "operators[0].blend", "blend: is 1.5"),
        ({"operators": [OperatorUse("golden", blend=-0.1)]}, InvalidRequestError, "operators[0].blend", "blend: is -0.1"),
        ({"operators": [OperatorUse("golden", blend=math.nan)]}, InvalidRequestError, "operators[0].blend", "blend: is nan"),
        ({"sampling": SamplingParams(max_tokens=-5)}, InvalidRequestError, "sampling.max_tokens", "-5"),
        ({"sampling": SamplingParams(max_tokens=0)}, InvalidRequestError, "sampling.max_tokens", "0"),
        ({"sampling": SamplingParams(temperature=math.nan)}, InvalidRequestError, "sampling.temperature", "nan"),
        ({"sampling": SamplingParams(temperature=-1)}, InvalidRequestError, "sampling.temperature", "-1"),
        ({"sampling": SamplingParams(top_p=0)}, InvalidRequestError, "sampling.top_p", "0"),
        ({"sampling": SamplingParams(logprobs=21)}, InvalidRequestError, "sampling.logprobs", "21"),
        ({"sampling": SamplingParams(time_limit=0)}, InvalidRequestError, "sampling.time_limit", "0"),
        ({"sampling": SamplingParams(stop_token_ids=[9, -2])}, InvalidRequestError, "sampling.stop_token_ids[1]", "-2"),
        ({"request_id": "x" * 129}, InvalidRequestError, "request_id", "129"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_value_that_is_not_accepted_is_refused_by_name(client, arguments, kind, field, words):
    call = {"prompt": "the bay", "sampling": SHORT} | arguments
    prompt = call.pop("prompt")
    for run in (client.generate, lambda *a, **k: list(client.stream(*a, **k))):
        with pytest.raises(InvalidRequestError) as caught:
            run(prompt, **call)
        assert type(caught.value) is kind
        assert caught.value.field == field
        assert words in str(caught.value)


def test_a_prompt_that_just_fits_leaves_room_for_one_token(client):
    result = client.generate([5] * 4095, sampling=SamplingParams(max_tokens=10, ignore_eos=True))
    assert result.finish_reason in (FinishReason.CONTEXT_LIMIT, FinishReason.MAX_TOKENS)
    assert result.usage.completion_tokens == 1
    assert result.finish_reason is FinishReason.CONTEXT_LIMIT


def test_a_chat_is_rendered_and_an_odd_role_harms_nobody(client):
    result = client.generate(Chat((ChatMessage("user", "hello"),)), sampling=SHORT)
    assert result.usage.prompt_tokens > 0
    client.generate(Chat((ChatMessage("nobody", ""),)), sampling=SHORT)


@pytest.mark.parametrize("temperature", [1e-40, 1e300])
def test_an_extreme_temperature_is_served(client, temperature):
    result = client.generate("the bay", sampling=replace(SHORT, temperature=temperature))
    assert result.usage.completion_tokens == 4


@pytest.mark.parametrize(
    "name", ["no-such-thing", "../golden", "/etc/passwd", "golden.safetensors", "", "GOLDEN", "日"]
)
def test_an_unknown_operator_is_named_and_the_known_ones_are_listed(client, name):
    for call in (
        lambda: client.generate("x", operators=[OperatorUse(name)]),
        lambda: client.compare("x", operators=[OperatorUse("golden"), OperatorUse(name)]),
        lambda: client.operator(name),
    ):
        with pytest.raises(UnknownOperatorError) as caught:
            call()
        assert repr(name) in str(caught.value)
        assert "golden" in str(caught.value)


def test_a_rule_of_a_later_contract_is_refused_by_its_number(server):
    with grpc.insecure_channel(server.target) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        use = pb.OperatorUse(name="golden", rule=9)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="x"), operators=[use]), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "is 9" in caught.value.details()
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in rpc_status.from_call(caught.value).details)
    assert bad.field_violations[0].field == "operators[0].rule"


@pytest.mark.parametrize(
    ("arms", "field"),
    [
        ({}, "arms"),
        ({"normal": GOLDEN}, "arms[0].name"),
        ({"": GOLDEN}, "arms[0].name"),
        ({"a": GOLDEN, "b": []}, "arms[1].operators"),
        ({f"arm-{place}": GOLDEN for place in range(17)}, "arms"),
    ],
    ids=["none", "normal", "nameless", "plain", "too many"],
)
def test_arms_that_make_no_comparison_are_refused_by_name(client, arms, field):
    with pytest.raises(InvalidRequestError) as caught:
        client.compare("x", arms=arms, sampling=SHORT)
    assert caught.value.field == field


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


def test_bytes_that_are_no_message_are_refused(server):
    with grpc.insecure_channel(server.target) as channel:
        call = channel.unary_unary("/steering.v1.GenerationService/Generate")
        for garbage in (b"\xff" * 40, b"\x0a\x05ab", bytes(range(256))):
            with pytest.raises(grpc.RpcError) as caught:
                call(garbage, timeout=10)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "GenerateRequest" in caught.value.details()


def test_a_method_that_does_not_exist_is_unimplemented(server):
    with grpc.insecure_channel(server.target) as channel:
        for path in ("/steering.v1.GenerationService/Guess", "/nothing.at.All/Here"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(b"", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_bytes_that_are_no_http2_harm_nobody(server):
    host, _, port = server.target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n\x00\xff" * 50)


def test_a_message_over_the_limit_is_refused_and_is_no_busy_server(client):
    with pytest.raises(ServerError, match="larger than max") as caught:
        client.generate("x" * (17 << 20))
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_huge_prompt_is_refused_and_holds_up_nobody(server, client):
    refused = []

    def send():
        with SteerClient(server.target, timeout=60) as other, pytest.raises(PromptTooLongError):
            other.generate("the bridge over the bay " * (1 << 16))
        refused.append(True)

    began = time.monotonic()
    sender = threading.Thread(target=send)
    sender.start()
    waits = []
    while sender.is_alive():
        asked = time.monotonic()
        assert client.health()
        waits.append(time.monotonic() - asked)
    assert refused
    assert max(waits) < (time.monotonic() - began) / 2


def test_many_prompts_at_once_are_each_read_as_if_alone(server, loaded):
    texts = [f"the bay {number} " * (number + 1) for number in range(24)]

    def ask(text):
        with SteerClient(server.target, timeout=30) as client:
            return list(client.tokenize(text).token_ids)

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(ask, texts * 4))
    assert found == [loaded.tokenizer(text)["input_ids"] for text in texts] * 4


@pytest.fixture
def unfinished(server):
    """Asserts that the test's long requests were stopped, not worked off."""
    before = server.sample("steer_completions_total", reason="MAX_TOKENS")
    yield
    assert server.sample("steer_completions_total", reason="MAX_TOKENS") == before


@pytest.mark.usefixtures("unfinished")
@pytest.mark.parametrize("operators", [[], GOLDEN], ids=["plain", "steered"])
def test_a_stream_that_is_cancelled_stops_its_work(server, client, operators):
    stream = client.stream("the bay", operators=operators, sampling=LONG)
    items = iter(stream)
    next(items)
    server.wait_for_jobs(1, 0)
    stream.cancel()
    server.wait_for_jobs(0, 0, timeout=1.5)
    with pytest.raises(RequestCancelledError):
        next(items)


@pytest.mark.usefixtures("unfinished")
def test_a_loop_that_is_left_stops_its_work(server, client):
    for _ in client.stream("the bay", sampling=LONG):
        server.wait_for_jobs(1, 0)
        break
    server.wait_for_jobs(0, 0, timeout=1.5)


@pytest.mark.usefixtures("unfinished")
def test_a_comparison_that_is_left_stops_its_work(server, client):
    for _ in client.compare_stream("the bay", operators=GOLDEN, sampling=LONG):
        server.wait_for_jobs(1, 0)
        break
    server.wait_for_jobs(0, 0, timeout=1.5)


_TALKER = """
import sys
from steer_client import SamplingParams, SteerClient
with SteerClient(sys.argv[1]) as client:
    for _ in client.stream("the bay", sampling=SamplingParams(max_tokens=4000, ignore_eos=True)):
        print("a token", flush=True)
"""


@pytest.mark.usefixtures("unfinished")
def test_a_client_process_that_is_killed_stops_its_work(server):
    command = [sys.executable, "-c", _TALKER, server.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as talker:
        assert talker.stdout.readline() == "a token\n"
        server.wait_for_jobs(1, 0)
        talker.send_signal(signal.SIGKILL)
        talker.wait(10)
    server.wait_for_jobs(0, 0, timeout=1.5)


@pytest.mark.usefixtures("unfinished")
def test_a_request_that_waits_and_is_cancelled_frees_its_place(server, client):
    first = client.stream("the bay", sampling=LONG)
    next(iter_first := iter(first))
    waiting = [client.stream("the bay", sampling=LONG) for _ in range(3)]
    server.wait_for_jobs(1, 3)
    for stream in waiting:
        stream.cancel()
    server.wait_for_jobs(1, 0, timeout=1.5)
    first.cancel()
    server.wait_for_jobs(0, 0, timeout=1.5)
    del iter_first


@pytest.mark.usefixtures("unfinished")
def test_a_deadline_ends_the_work(server, client):
    late = {"grpc_method": "Generate", "grpc_code": "DEADLINE_EXCEEDED"}
    before = server.sample("grpc_server_handled_total", **late)
    with pytest.raises(DeadlineExceededError, match=r"0\.3 s"):
        client.generate("the bay", operators=GOLDEN, sampling=LONG, timeout=0.3)
    server.wait_for_jobs(0, 0, timeout=1.5)
    with pytest.raises(DeadlineExceededError):
        for _ in client.stream("the bay", sampling=LONG, timeout=0.3):
            pass
    server.wait_for_jobs(0, 0, timeout=1.5)
    assert server.sample("grpc_server_handled_total", **late) == before + 1


@pytest.mark.usefixtures("unfinished")
@pytest.mark.parametrize("operators", [[], GOLDEN], ids=["plain", "steered"])
def test_a_time_limit_returns_the_text_so_far(client, operators):
    limited = replace(LONG, time_limit=0.5)
    began = time.monotonic()
    result = client.generate("the bay", operators=operators, sampling=limited)
    assert time.monotonic() - began < 2
    assert result.finish_reason is FinishReason.TIME_LIMIT
    assert 0 < result.usage.completion_tokens < 4000
    assert len(result.receipts) == len(operators)
    for receipt in result.receipts:
        assert receipt.generated_tokens_steered == result.usage.completion_tokens - 1


@pytest.mark.usefixtures("unfinished")
def test_a_time_limit_ends_every_arm_of_a_comparison(client):
    result = client.compare("the bay", operators=GOLDEN, sampling=replace(LONG, time_limit=1.0))
    steered = result.steered["steered"]
    assert result.normal.finish_reason is steered.generation.finish_reason is FinishReason.TIME_LIMIT
    assert steered.kl is not None


def test_of_fifty_clients_at_once_some_are_sent_away_and_all_others_served(server):
    start = threading.Barrier(50)
    sampling = SamplingParams(max_tokens=100, ignore_eos=True)

    def ask(number):
        with SteerClient(server.target, timeout=60) as client:
            client.health()
            start.wait(30)
            try:
                return client.generate(f"the bay {number}", operators=GOLDEN if number % 2 else [], sampling=sampling)
            except ServerBusyError as busy:
                return busy

    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(ask, range(50)))
    busy = [result for result in results if isinstance(result, ServerBusyError)]
    served = {number: result for number, result in enumerate(results) if not isinstance(result, ServerBusyError)}
    assert busy
    # One runs and eight wait.
    assert len(served) >= 9
    assert all(result.retry_after > 0 for result in busy)
    for number, result in served.items():
        assert result.usage.completion_tokens == 100
        assert len(result.receipts) == number % 2
        for receipt in result.receipts:
            assert receipt.generated_tokens_steered == 99
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
