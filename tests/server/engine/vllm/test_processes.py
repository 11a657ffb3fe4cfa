"""Where vLLM's engine core runs, and when it ends, with one in its place that only sleeps."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

# Packages are found here before the real ones: importing vLLM takes seconds, in every process anew.
CORE = """
import os, signal, subprocess, time


class EngineCoreProc:
    @staticmethod
    def run_engine_core(*, stubborn):
        signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else signal.SIG_DFL)
        worker = subprocess.Popen(["sleep", "60"])
        print(os.getpid(), worker.pid, flush=True)
        time.sleep(60)
"""
SERVER = """
import multiprocessing, sys
from vllm.v1.engine.core import EngineCoreProc
from steer_server.engine.vllm import processes as vllm_processes

vllm_processes._TERMINATE_SECONDS = 0.5

if __name__ == "__main__":
    before = EngineCoreProc.run_engine_core
    method, stubborn = sys.argv[1], sys.argv[2] == "stubborn"
    with vllm_processes.engine_core_in_its_own_session():
        target = EngineCoreProc.run_engine_core
        core = multiprocessing.get_context(method).Process(target=target, kwargs={"stubborn": stubborn})
        core.start()
    assert EngineCoreProc.run_engine_core is before
    core.join()
"""


@pytest.fixture
def start(tmp_path):
    """``start(method, kind)``: the server, its engine core and the core's worker."""
    package = tmp_path / "vllm" / "v1" / "engine"
    package.mkdir(parents=True)
    (package / "core.py").write_text(CORE, encoding="utf-8")
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    script = tmp_path / "server.py"
    script.write_text(SERVER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    started = []

    def run(method, kind="obliging"):
        server = subprocess.Popen(
            [sys.executable, script, method, kind],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment,
        )
        family = [psutil.Process(int(pid)) for pid in (server.pid, *server.stdout.readline().split())]
        started.extend([server, *family])
        return family

    yield run
    for process in reversed(started):
        if isinstance(process, subprocess.Popen):
            process.kill()
            process.communicate()
        elif process.is_running():
            process.kill()


def _runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_signal_to_the_servers_group_does_not_reach_vllm(start, method):
    server, core, worker = start(method)
    assert os.getpgid(worker.pid) == os.getpgid(core.pid) == core.pid
    # It would end at the signal, and the others for that reason.
    server.suspend()
    while server.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(server.pid, number)
    time.sleep(0.3)
    assert _runs(core)
    assert _runs(worker)


@pytest.mark.parametrize(("method", "kind"), [("fork", "stubborn"), ("spawn", "obliging")])
def test_nothing_of_vllm_outlives_a_server_that_is_killed(start, method, kind):
    server, core, worker = start(method, kind)
    server.kill()
    end = time.monotonic() + 20
    while _runs(core) or _runs(worker):
        assert time.monotonic() < end
        time.sleep(0.05)
