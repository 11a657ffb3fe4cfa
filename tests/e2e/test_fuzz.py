"""Many, huge, extreme and malformed requests to every method (tests/bench/fuzz_server.py has the long run)."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from steer_client import SteerClient

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "fuzz_server.py"


def test_no_request_of_any_method_breaks_the_server(server):
    lines = len(server.log)
    command = [sys.executable, str(SCRIPT), "--target", server.target, "--pid", str(server.process.pid), "--json"]
    ran = subprocess.run([*command, "--requests", "600"], capture_output=True, text=True, timeout=240)
    assert ran.stdout, ran.stderr
    found = json.loads(ran.stdout)
    assert found["faults"] == 0, found["examples"]
    assert found["alive"]
    assert "Traceback" not in "\n".join(server.log[lines:])
    # There is something of everything: requests that are served, and those that are told why not.
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= set(found["codes"])
    server.wait_for_jobs(0, 0, timeout=20)


def varint(value):
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*parts, value))


def block(number, content):
    """A field that has a length."""
    return bytes((number << 3 | 2,)) + varint(len(content)) + content


EMPTY = 1_000_000
MANY = {
    "arms": ("Compare", b"\x22\x00" * EMPTY),
    "chat": ("Generate", block(2, block(3, b"\x0a\x00" * EMPTY))),
    "operators": ("Generate", b"\x22\x00" * EMPTY),
    "ids": ("Tokenize", block(1, block(2, b"\x08\x05" * EMPTY))),
    "packed ids": ("Generate", block(2, block(2, block(1, b"\x05" * EMPTY)))),
    "stop strings": ("GenerateStream", block(3, b"\x42\x00" * EMPTY)),
    "stop ids": ("Generate", block(3, b"\x48\x05" * EMPTY)),
    "words": ("Generate", block(4, b"\x52\x00" * EMPTY)),
    "one name": ("Compare", block(4, block(1, b"x" * EMPTY))),
    "one text": ("Generate", block(2, block(1, b"x" * EMPTY))),
    "one role": ("Generate", block(2, block(3, block(1, block(1, b"x" * EMPTY))))),
    "unknown": ("Generate", b"\x7a\x00" * EMPTY),
}


def test_many_of_anything_hold_up_nobody_and_are_forgotten(server, client):
    process, longest, served = psutil.Process(server.process.pid), [], threading.Event()

    def look():
        with SteerClient(server.target, timeout=60) as other:
            while not served.is_set():
                began = time.monotonic()
                other.health()
                longest.append(time.monotonic() - began)
                time.sleep(0.05)

    def send_all(channel):
        for name, (method, data) in MANY.items():
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.stream_stream(f"/steering.v1.GenerationService/{method}")(iter([data]), timeout=60))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, name

    with ThreadPoolExecutor(5) as pool, grpc.insecure_channel(server.target) as channel:
        send_all(channel)
        before = process.memory_info().rss
        looking = pool.submit(look)
        try:
            for sent in [pool.submit(send_all, channel) for _ in range(8)]:
                sent.result()
        finally:
            served.set()
            looking.result()
    # Parsing and converting them took from 3 to 112 s, and gigabytes.
    assert max(longest) < 2
    assert process.memory_info().rss < 1.1 * before + (32 << 20)
