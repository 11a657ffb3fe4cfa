"""A short run of the fuzz over every method's descriptors (tests/bench/fuzz_server.py has the long one)."""

import json
import subprocess
import sys
from pathlib import Path

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
