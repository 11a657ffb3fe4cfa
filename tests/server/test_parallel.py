"""In the server's process one thread works on several cores: the one that decodes."""

import asyncio
import os
import subprocess
import sys
import threading

import pytest

from steer_server.parallel import in_own_thread

SCRIPT = """
import asyncio, os, sys
import torch
from operators.model import loading
from steer_server.admin.threads import FileThreads
from steer_server.config import ServerConfig
from steer_server.fair_threads import FairThreads
from steer_server.engine.hf import self_test
from steer_server.engines import ENGINES
from steer_server.parallel import others_work_on_one_core
from steer_server.types import DecodeJob, SamplingParams
from steer_server.types.jobs import Row

torch.set_num_threads(4)
numbers, matrix = torch.ones(4_000_000), torch.ones(600, 600)

def tasks():
    return set(os.listdir("/proc/self/task"))

def team():
    # Of this thread: what its first product of matrices and its first large sum add.
    before = tasks()
    matrix @ matrix
    numbers + numbers
    return tasks() - before

load, choose, found = loading.load_model, self_test.Decoder._choose_tokens, {}

def load_with_a_team(*args, **options):
    found["load"] = team()
    return load(*args, **options)

def choose_and_tell(*args):
    found["decoding"] = torch.get_num_threads()
    return choose(*args)

async def main():
    loading.load_model = load_with_a_team
    engine, _ = await ENGINES["hf"](ServerConfig(model=sys.argv[1]), "float32", "cpu")
    others_work_on_one_core()
    # The system ends them after their thread.
    for _ in range(100):
        if not found["load"] & tasks():
            break
        await asyncio.sleep(0.05)
    print("load:", len(found["load"]), "of which left:", len(found["load"] & tasks()))
    self_test.Decoder._choose_tokens = choose_and_tell
    async for _ in engine.submit(DecodeJob.of((1, 2), SamplingParams(max_tokens=2), (Row(),))):
        pass
    print("decoding:", found["decoding"])
    print("loop:", len(team()), "thread:", await asyncio.to_thread(lambda: len(team())))
    print("words:", len(await FairThreads(1, "words").run(team)), "store:", len(await FileThreads().start(team)))
    await engine.close()

asyncio.run(main())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not list threads")
def test_the_decoding_thread_alone_works_on_several_cores(tiny_directory):
    command = [sys.executable, "-c", SCRIPT, str(tiny_directory("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.splitlines() == [
        "load: 3 of which left: 0",
        "decoding: 4",
        "loop: 0 thread: 0",
        "words: 0 store: 0",
    ], done.stderr


async def test_an_own_thread_gives_what_its_function_gives_and_has_ended_by_then():
    thread = await in_own_thread(threading.current_thread)
    assert not thread.is_alive()
    with pytest.raises(ZeroDivisionError):
        await in_own_thread(lambda: 1 // 0)


async def test_who_is_cancelled_does_not_wait_for_an_own_thread():
    may_end = threading.Event()
    waiting = asyncio.ensure_future(in_own_thread(may_end.wait))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(waiting, 5)
    may_end.set()
