"""Whatever becomes of its log, a server serves, and stops when it is told to."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from steer_client import SamplingParams, SteerClient

BIN = Path(sys.executable).parent
SHORT = SamplingParams(max_tokens=1)


@pytest.mark.parametrize("reader", ["has gone", "does not read"])
def test_a_server_whose_log_is_not_read_serves_and_stops(tiny_model, tiny_store, reader):
    options = ("--listen", "127.0.0.1:0", "--store", str(tiny_store), "--log-format", "json", "--max-queue", "200")
    command = [str(BIN / "steer-server"), "--model", str(tiny_model), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not (found := re.search(rb'"listen": "(.*?)"', process.stderr.readline())):
            assert process.poll() is None
        if reader == "has gone":
            process.stderr.close()
        with SteerClient(found[1].decode(), timeout=30) as client:
            for _ in range(700):
                client.tokenize("x")
            assert client.generate("x", sampling=SHORT).token_ids
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 30
    finally:
        process.kill()
        process.wait(10)
