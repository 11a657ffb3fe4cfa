"""Stopping a server: what runs ends whole or is cut short with its proof, what waits is refused, the exit is clean."""

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from steer_client import (
    FinishReason,
    OperatorUse,
    RequestCancelledError,
    SamplingParams,
    ServerUnavailableError,
    SteerClient,
    SteerError,
)

GOLDEN = [OperatorUse("golden", 0.5)]


def _clean(server):
    log = "\n".join(server.log)
    assert "Traceback" not in log
    assert "stopping" in log


def _read(stream, into):
    def run():
        for _ in stream:
            pass
        into.append(stream.result)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def _refused(target):
    """New requests are refused, on a channel of their own, from now on or very soon.

    One that arrives while the port is being closed may still be served, or cut off.
    """
    end = time.monotonic() + 3
    while True:
        with SteerClient(target, timeout=5, retry=False) as client:
            try:
                client.generate("x", sampling=SamplingParams(max_tokens=1))
            except ServerUnavailableError:
                return
            except RequestCancelledError:
                pass
        assert time.monotonic() < end, "the server still takes requests"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_an_idle_server_stops_at_once(start_tiny, number):
    with start_tiny() as server:
        with SteerClient(server.target, timeout=10, retry=False) as client:
            assert client.health()
            began = time.monotonic()
            server.signal(number)
            assert server.exit_code(5) == 0
            assert time.monotonic() - began < 5
            with pytest.raises(ServerUnavailableError):
                client.health()
        _clean(server)


def test_a_text_that_ends_within_the_grace_is_whole(start_tiny):
    sampling = SamplingParams(max_tokens=700, ignore_eos=True)
    with start_tiny("--grace", "60") as server, SteerClient(server.target, timeout=60, retry=False) as client:
        stream = client.stream("the bay", operators=GOLDEN, sampling=sampling)
        items = iter(stream)
        next(items)
        server.signal()
        _refused(server.target)
        for _ in items:
            pass
        assert stream.result.finish_reason is FinishReason.MAX_TOKENS
        assert stream.result.usage.completion_tokens == 700
        assert stream.result.receipts[0].generated_tokens_steered == 699
        # It does not sit out the rest of the grace.
        assert server.exit_code(20) == 0
        _clean(server)


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_the_server_at_once(start_tiny, second, code):
    sampling = SamplingParams(max_tokens=4000, ignore_eos=True)
    with start_tiny("--grace", "60") as server, SteerClient(server.target, timeout=60, retry=False) as client:
        # Held until the end: a stream that nobody holds is cancelled, and the server has nothing to wait for.
        items = iter(client.stream("the bay", sampling=sampling))
        next(items)
        server.signal()
        _refused(server.target)
        began = time.monotonic()
        server.signal(second)
        assert server.exit_code(5) == code
        assert time.monotonic() - began < 5


def test_what_outlasts_the_grace_is_cut_short_with_its_receipts_and_what_waits_is_refused(start_tiny):
    sampling = SamplingParams(max_tokens=4000, ignore_eos=True)
    with (
        start_tiny("--grace", "1.5", "--max-running", "1") as server,
        SteerClient(server.target, timeout=60, retry=False) as client,
    ):
        running = client.stream("the bay", operators=GOLDEN, sampling=sampling)
        items = iter(running)
        next(items)
        waiting = client.stream("the bay", sampling=sampling)
        refused = []

        def wait():
            with pytest.raises(ServerUnavailableError) as caught:
                for _ in waiting:
                    pass
            refused.append(caught.value)

        waiter = threading.Thread(target=wait)
        waiter.start()
        server.wait_for_jobs(1, 1)
        server.signal()
        count = 1 + sum(len(delta.token_ids) for delta in items)
        waiter.join(10)
        result = running.result
        assert result.finish_reason is FinishReason.CANCELLED
        assert 1 < result.usage.completion_tokens == count < 4000
        assert result.receipts[0].generated_tokens_steered == count - 1
        assert refused[0].reason == "SHUTTING_DOWN"
        assert server.exit_code(10) == 0
        _clean(server)


def test_every_call_that_comes_during_the_drain_is_told_that_the_server_stops(start_tiny):
    sampling = SamplingParams(max_tokens=4000, ignore_eos=True)
    heard = []

    def ask(target):
        with SteerClient(target, timeout=10, retry=False) as client:
            for _ in range(20):
                try:
                    client.generate("x", sampling=SamplingParams(max_tokens=1))
                except SteerError as error:
                    heard.append(getattr(error, "reason", ""))

    with start_tiny("--grace", "30") as server, SteerClient(server.target, timeout=60, retry=False) as client:
        running = client.stream("the bay", sampling=sampling)
        items = iter(running)
        next(items)
        server.signal()
        _refused(server.target)
        askers = [threading.Thread(target=ask, args=(server.target,)) for _ in range(8)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(20)
        assert heard == ["SHUTTING_DOWN"] * 160
        # The text that was running goes on; when nobody wants it any more, the server need not wait.
        assert next(items)
        running.cancel()
        assert server.exit_code(10) == 0
        _clean(server)


def _watch_health(target, seen, ended):
    """Notes each change of what the server says of itself, by the names that probes ask for."""
    names = ("", "live", "started")
    while not ended.is_set():
        with grpc.insecure_channel(target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                states = [stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5) for name in names]
            except grpc.RpcError:
                states = []
            if states and (not seen or seen[-1] != [state.status for state in states]):
                seen.append([state.status for state in states])
        ended.wait(0.05)


def test_a_server_says_how_it_is_from_its_first_moment_to_its_last(start_tiny, free_port, monkeypatch, tmp_path):
    target, seen, ended = f"127.0.0.1:{free_port}", [], threading.Event()
    watcher = threading.Thread(target=_watch_health, args=(target, seen, ended))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        watcher.start()
        try:
            with start_tiny("--listen", target, "--drain-delay", "2") as server:
                assert systemd.recv(100).startswith(b"READY=1")
                with SteerClient(target, timeout=20, retry=False) as client:
                    client.generate("x", sampling=SamplingParams(max_tokens=1))
                    # The one that watches connects again after the handover, in its own time.
                    end = time.monotonic() + 30
                    while len(seen) < 2 and time.monotonic() < end:
                        time.sleep(0.01)
                    server.signal()
                    assert systemd.recv(100).startswith(b"STOPPING=1")
                    # It does not want new calls, and serves them.
                    assert not client.health()
                    assert client.generate("x", sampling=SamplingParams(max_tokens=1)).usage.completion_tokens == 1
                assert server.exit_code(20) == 0
                _clean(server)
        finally:
            ended.set()
            watcher.join(20)
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert seen == [
        [not_serving, serving, not_serving],  # it loads
        [serving, serving, serving],
        [not_serving, serving, serving],  # it stops
    ]


LOADING = """
import asyncio, sys, time, types

class VLLMEngine:
    @classmethod
    async def start(cls, *_args, **_kwargs):
        print("vLLM loads", file=sys.stderr, flush=True)
        await asyncio.to_thread(time.sleep, 600)

sys.modules["steer_server.engine.vllm.engine"] = types.SimpleNamespace(VLLMEngine=VLLMEngine)
sys.modules["steer_server.engine.vllm.engine_config"] = types.SimpleNamespace(DEVICE="cpu")
from steer_server.command import app
app()
"""
"""A server whose vLLM takes its time; vLLM itself need not be there."""


def test_ctrl_c_does_not_wait_for_a_model_that_vllm_loads(tiny_model):
    options = ("--engine", "vllm", "--model", str(tiny_model), "--listen", "127.0.0.1:0")
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while "vLLM loads" not in (line := process.stderr.readline()):
            assert line, "it ended before"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == "steer-server: interrupted\n"
    finally:
        process.kill()


LONG_PASS = """
import sys, torch
from steer_server.engine.hf.decode import Decoder

plain = Decoder._forward

def forward(self, slots, ids, *, prompt):
    if not self.job.caller.host:
        # The server's own test of itself, before it serves.
        return plain(self, slots, ids, prompt=prompt)
    print("a long pass begins", file=sys.stderr, flush=True)
    numbers = torch.rand(7000, 7000)
    for _ in range(20):
        numbers = numbers @ numbers

Decoder._forward = forward
from steer_server.command import app
app()
"""
"""A server in which the first forward pass for a client goes on in torch for minutes."""


def test_a_forward_pass_that_outlasts_the_grace_does_not_abort_the_process(tiny_model, tiny_store):
    options = ("--model", tiny_model, "--store", tiny_store, "--listen", "127.0.0.1:0", "--grace", "0.5")
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_PASS, *map(str, options)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    failures = []

    def ask(target):
        with SteerClient(target, timeout=60, retry=False) as client, pytest.raises(SteerError) as caught:
            client.generate("x")
        failures.append(caught.value)

    try:
        while "listen=" not in (line := process.stderr.readline()):
            assert line, "it ended before"
        client = threading.Thread(target=ask, args=(line.split("listen=")[1].split()[0],))
        client.start()
        while "a long pass begins" not in (line := process.stderr.readline()):
            assert line, "it ended before"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - began < 15
        client.join(10)
        # Told, and not left to guess.
        assert isinstance(failures[0], ServerUnavailableError)
    finally:
        process.kill()


@pytest.fixture
def process_1():
    """The front of a command that makes it process 1 of a namespace, as a container does."""
    front = ["unshare", "--pid", "--fork", "--kill-child"]
    if not shutil.which(front[0]) or subprocess.run([*front, "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a namespace for processes")
    return front


def test_sigterm_ends_process_1_while_it_loads(process_1, tiny_model, tiny_store):
    options = ("--model", tiny_model, "--store", tiny_store, "--listen", "127.0.0.1:0")
    command = [*process_1, sys.executable, "-m", "steer_server", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert "loading" in process.stderr.readline()
            [server] = psutil.Process(process.pid).children()
            server.send_signal(signal.SIGTERM)
            assert process.wait(20) == 143
            assert "listen=" not in process.stderr.read()
        finally:
            process.kill()
