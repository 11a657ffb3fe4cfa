"""What becomes of a server that is told to stop: exit code, seconds, requests lost, processes left.

    python tests/bench/stop_server.py [--engine hf] [--case streaming]... [--json]

Each case is a server of its own, on the default model, asked by real clients: stopped while it is idle, decodes
streams, reads the prompt of a comparison of 16 arms, has a full queue, or loads its model; by a second signal at once;
and, with vLLM, when its engine core is killed. A request is lost where its client hears neither a text with its proof,
nor that the server stops. Not a test; nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import steer_client
from steer_client import OperatorUse, SamplingParams, SteerClient

BIN = Path(sys.executable).parent
VLLM = ("--engine-args", "enforce_eager=true", "--engine-args", "max_model_len=2048")
LONG = SamplingParams(max_tokens=1900, ignore_eos=True)
PROMPT = "The three most important things in life are"
FAIR = ("ServerUnavailableError", "ServerBusyError", "text", "cut short")
GRACE = 4.0


class Server:
    """One server process; what it says is kept."""

    def __init__(self, engine: str, store: str, *options: str) -> None:
        command = [BIN / "steer-server", "--engine", engine, "--store", store, "--listen", "127.0.0.1:0", *options]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        self.process = subprocess.Popen(
            [*map(str, command), *(VLLM if engine == "vllm" else ())],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.target = ""
        self.family: set[psutil.Process] = set()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.lines.append(line.rstrip())
            if found := re.search(r"serving\s.*listen=(\S+)", line):
                self.target = found[1]

    def wait_for(self, condition: Callable[[], Any], seconds: float = 400.0) -> None:
        """Returns when the condition holds, or the process has ended."""
        end = time.monotonic() + seconds
        while not condition() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        self.family |= set(self.children())

    def children(self) -> list[psutil.Process]:
        """The processes that it has started, by now."""
        return psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []

    def left(self) -> int:
        """Processes of it that still run five seconds after its end."""
        _, alive = psutil.wait_procs(self.family, timeout=15)
        return sum(process.status() != psutil.STATUS_ZOMBIE for process in alive)


class Clients:
    """Requests in threads, and what became of each."""

    def __init__(self, target: str) -> None:
        self.target, self.ends, self.begun = target, Counter[str](), 0
        self._threads: list[threading.Thread] = []

    def ask(self, request: Callable[[SteerClient, Callable[[], None]], str]) -> None:
        """Asks in a thread of its own."""
        thread = threading.Thread(target=self._run, args=(request,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, request: Callable[[SteerClient, Callable[[], None]], str]) -> None:
        try:
            with SteerClient(self.target, timeout=120) as client:
                self.ends[request(client, self._begin)] += 1
        except steer_client.SteerError as error:
            self.ends[type(error).__name__] += 1

    def _begin(self) -> None:
        self.begun += 1

    def join(self) -> None:
        """Waits for all of them."""
        for thread in self._threads:
            thread.join(120)

    @property
    def lost(self) -> int:
        """Requests whose clients heard neither a text nor that the server stops."""
        return len(self._threads) - sum(self.ends[end] for end in FAIR)


def stream(client: SteerClient, begin: Callable[[], None]) -> str:
    """A long steered text, token by token."""
    events = client.stream(PROMPT, operators=[OperatorUse("bridge", 0.3)], sampling=LONG)
    for index, _ in enumerate(events):
        if not index:
            begin()
    return "text" if len(events.result.token_ids) == LONG.max_tokens else "cut short"


def compare(client: SteerClient, begin: Callable[[], None]) -> str:
    """A comparison of 16 arms behind a long prompt."""
    arms = {f"a{index}": [OperatorUse("bridge", 0.02 * (index + 1))] for index in range(16)}
    begin()
    found = client.compare(PROMPT * 150, arms=arms, sampling=SamplingParams(max_tokens=200, ignore_eos=True))
    return "text" if len(found.normal.token_ids) == 200 else "cut short"


def run(case: str, engine: str, store: str) -> dict[str, Any]:
    """One case: a line of the table."""
    options = ["--grace", "60" if case == "second signal" else str(GRACE), "--max-queue", "8"]
    server = Server(engine, store, *options)
    clients = None
    if case == "loading":
        server.wait_for(lambda: any("loading" in line for line in server.lines))
        server.wait_for(lambda: len(server.children()) > 1, 20.0)
    else:
        server.wait_for(lambda: server.target)
        clients = Clients(server.target)
        count = {"idle": 0, "prefill of 16 arms": 1, "queue full": 300}.get(case, 4)
        for _ in range(count):
            clients.ask(compare if case.startswith("prefill") else stream)
        server.wait_for(lambda: clients.begun >= min(count, 1 if engine == "hf" else 4), 60.0)
        time.sleep(1.0 if count else 0.0)
    began = time.monotonic()
    if case == "core killed":
        core = next(child for child in server.children() if "EngineCore" in " ".join([child.name(), *child.cmdline()]))
        core.kill()
    else:
        server.process.send_signal(signal.SIGTERM)
    if case == "second signal":
        time.sleep(0.5)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
    try:
        code: int | None = server.process.wait(90)
    except subprocess.TimeoutExpired:
        code = None
        server.process.kill()
    seconds = time.monotonic() - began
    if clients is not None:
        clients.join()
    own = [line for line in server.lines if line.startswith("steer-server:")]
    return {
        "case": case,
        "exit": code,
        "seconds": round(seconds, 1),
        "lost": clients.lost if clients and case not in ("second signal", "core killed") else 0,
        "ends": dict(clients.ends) if clients else {},
        "left": server.left(),
        "said": own[-1] if own else "",
        "tracebacks": sum("Traceback" in line for line in server.lines),
    }


def main() -> None:
    """Prints the table, or JSON."""
    cases = ["idle", "streaming", "prefill of 16 arms", "queue full", "loading", "second signal", "core killed"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    parser.add_argument("--case", action="append", choices=cases)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    chosen = given.case or [case for case in cases if given.engine == "vllm" or case != "core killed"]
    with tempfile.TemporaryDirectory() as store:
        build = [BIN / "steer-operators", "build", "bridge", "--text", "The Golden Gate Bridge in San", "--rank", "16"]
        subprocess.run([*map(str, build), "--layer", "15", "--store", store], check=True, stdout=subprocess.DEVNULL)
        for case in chosen:
            line = run(case, given.engine, store)
            if given.json:
                print(json.dumps(line), flush=True)
                continue
            print(
                f"{line['case']:20} exit {line['exit']!s:5} {line['seconds']:5.1f} s   lost {line['lost']}   "
                f"left {line['left']}   {line['ends']} {line['said']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
