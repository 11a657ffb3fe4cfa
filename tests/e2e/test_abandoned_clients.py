"""Work that nobody waits for any more is stopped, and the server goes on serving."""

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from steer_client import (
    DeadlineExceededError,
    FinishReason,
    OperatorUse,
    RequestCancelledError,
    SamplingParams,
    ServerBusyError,
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
    # Of one client four run at once.
    others = [client.stream("the bay", sampling=LONG) for _ in range(6)]
    server.wait_for_jobs(4, 3)
    for stream in others:
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
        with SteerClient(server.target, timeout=60, retry=False) as client:
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
