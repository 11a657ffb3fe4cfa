"""``build --file`` started several times over one store, as torchrun does on one machine and on many."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from operators.core.store import Store

NAMES = [f"a{number}" for number in range(12)]
FILE = "".join(f'[[concept]]\nname = "{name}"\ntext = "The golden gate"\nrank = 5\n' for name in NAMES)


@pytest.fixture
def start(tmp_path, shelf, tiny_directory):
    """``start(rank)``: the command as one of two ranks."""
    (tmp_path / "c.toml").write_text(FILE)
    command = [sys.executable, "-m", "operators", "build", "--file", "c.toml", "--store", str(shelf)]
    ranks = []

    def rank(number):
        told = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        environment = os.environ | told | {"STEER_MODEL": str(tiny_directory("llama"))}
        ranks.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True))
        return ranks[-1]

    yield rank
    for process in ranks:
        process.kill()
        process.wait()
        process.stdout.close()


def test_ranks_build_each_operator_once_and_one_that_is_killed_leaves_its_own_to_the_other(
    start, build_file, shelf, tmp_path, monkeypatch
):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    killed = start(1)
    told = [killed.stdout.readline()]
    held = _stopped_at_work(killed, shelf)
    done = Store(shelf).names()
    assert held not in done
    other = start(0)
    lines = [other.stdout.readline() for _ in NAMES[1:]]
    # It has done all but what the first one holds, and waits for that.
    assert set(Store(shelf).names()) == set(NAMES) - {held}
    assert other.poll() is None
    killed.kill()
    told += killed.communicate()[0].splitlines()
    lines += other.communicate(timeout=60)[0].splitlines()
    assert other.returncode == 0
    built = [line.split()[0] for line in lines if line.split()[1] == "built"]
    assert {line.split()[0] for line in told} <= set(done)
    assert sorted(built) == sorted(set(NAMES) - set(done))
    assert built[-1] == held
    # Nothing is left beside the operators, and they are those of one process.
    assert sorted(os.listdir(shelf)) == sorted(f"{name}.safetensors" for name in NAMES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        build_file(FILE, "--store", str(tmp_path / "alone"))
    finally:
        torch.set_num_threads(threads)
    for path in shelf.iterdir():
        assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes()


def _stopped_at_work(process, shelf):
    """Stops a process while it is at work on an operator, and gives that one's name."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        for lock in shelf.glob(".*.lock"):
            name = lock.name[1:].removesuffix(".lock")
            if f"by process {process.pid}" in lock.read_text() and name not in Store(shelf).names():
                return name
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.001)
    raise AssertionError("it never held a name")
