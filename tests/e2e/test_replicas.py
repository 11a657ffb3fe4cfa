"""Two servers on one store behind one target: both are used, both answer alike, and one can stop unnoticed."""

import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from steer_client import FinishReason, OperatorUse, SamplingParams, ServerUnavailableError, SteerClient, SteerError

BIN = Path(sys.executable).parent
GOLDEN = [OperatorUse("golden", 0.5)]
DRAWN = SamplingParams(max_tokens=12, temperature=1.0, seed=11, ignore_eos=True)
LONG = SamplingParams(max_tokens=4000, ignore_eos=True)


@pytest.fixture(scope="module")
def pair(start_tiny):
    """Started at the same time. The first one, when it is stopped, does not wait long for requests under way."""
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        yield list(
            pool.map(
                lambda options: stack.enter_context(start_tiny(*options)),
                [("--grace", "0.5", "--max-running", "1"), ()],
            )
        )


@pytest.fixture(scope="module")
def client(pair):
    with SteerClient("ipv4:" + ",".join(server.target for server in pair), timeout=60) as made:
        yield made


def _completions(pair):
    return [server.sample("steer_completions_total") for server in pair]


def _proof(generation):
    return generation.text, generation.token_ids, generation.seed, generation.receipts


def test_requests_of_one_client_are_spread_over_both_servers_and_both_answer_alike(pair, client):
    end = time.monotonic() + 10
    while not all(server.sample("grpc_server_started_total", grpc_method="Tokenize") for server in pair):
        # Until both connections are there, all requests go to the first one.
        client.tokenize("x")
        assert time.monotonic() < end
    before = _completions(pair)
    answers = [client.generate("the bay", operators=GOLDEN, sampling=DRAWN) for _ in range(20)]
    served = [after - there for after, there in zip(_completions(pair), before, strict=True)]
    assert sum(served) == 20
    assert min(served) >= 8
    assert answers[0].receipts[0].generated_tokens_steered == 11
    alone = []
    for server in pair:
        with SteerClient(server.target, timeout=60) as direct:
            alone.append(direct.generate("the bay", operators=GOLDEN, sampling=DRAWN))
    assert {_proof(answer) for answer in (*answers, *alone)} == {_proof(answers[0])}


def _as_shown(pair, language, beginning):
    """A block of docs/LARGE.md, on the addresses of these servers."""
    page = (Path(__file__).parents[2] / "docs/LARGE.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    [shown] = [block for block in blocks if block.startswith(beginning)]
    for number, server in enumerate(pair, start=1):
        shown = shown.replace(f"10.0.0.{number}:50051", server.target)
    assert "10.0.0" not in shown
    return shown


def _run(*command):
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)


def test_the_python_that_the_page_shows_runs_on_them(pair):
    before = _completions(pair)
    _run(sys.executable, "-c", _as_shown(pair, "python", "from steer_client"))
    assert sum(_completions(pair)) == sum(before) + 4


def test_the_command_that_the_page_shows_reloads_each(pair):
    def reloads():
        return [server.sample("grpc_server_handled_total", grpc_method="ReloadOperators") for server in pair]

    before = reloads()
    _run("bash", "-euc", _as_shown(pair, "sh", "for server in"))
    assert reloads() == [count + 1 for count in before]


def test_no_request_fails_while_one_of_two_servers_stops(pair, client):
    """One decodes a long text, so that requests wait in its queue; they outlast its grace and go to the other."""
    one, other = pair
    expected = _proof(client.generate("the bay", operators=GOLDEN, sampling=DRAWN))
    answers, enough = [], threading.Event()

    def ask():
        while not enough.is_set():
            try:
                answers.append(_proof(client.generate("the bay", operators=GOLDEN, sampling=DRAWN)))
            except SteerError as error:
                answers.append(error)

    with SteerClient(one.target, timeout=60) as direct:
        long = direct.stream("the bay", sampling=LONG)
        items = iter(long)
        next(items)
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        # Every thread comes to the occupied server sooner or later.
        one.wait_for_jobs(1, 4, timeout=10)
        one.signal()
        for _ in items:
            pass
        assert long.result.finish_reason is FinishReason.CANCELLED
        assert one.exit_code(20) == 0
        served = other.sample("steer_completions_total")
        end = time.monotonic() + 10
        while other.sample("steer_completions_total") < served + 10:
            assert time.monotonic() < end
        enough.set()
        for thread in threads:
            thread.join(30)
    assert set(answers) == {expected}
    # The four that waited were refused, which their callers did not see.
    assert sum("Generate " in line and "UNAVAILABLE" in line for line in one.log) == 4
    # That the client watched its health, and that this ended, is nothing to warn of.
    assert not any("Watch" in line for line in one.log)
    with SteerClient(one.target, timeout=5) as direct, pytest.raises(ServerUnavailableError):
        direct.health()
