"""A start of vLLM that nobody waits for any more."""

import asyncio
import threading

import pytest

pytestmark = pytest.mark.vllm


async def test_a_start_that_is_cancelled_leaves_no_process_that_outlives_the_server(monkeypatch):
    from vllm.v1.engine.core import EngineCoreProc

    from steer_server.engine.vllm import boot, processes

    begun, goes_on, ended, targets = threading.Event(), threading.Event(), threading.Event(), []

    def start(_config, **_options):
        begun.set()
        goes_on.wait(10)
        # What vLLM gives the process that it starts.
        targets.append(EngineCoreProc.run_engine_core)
        ended.set()

    monkeypatch.setattr(boot.AsyncLLM, "from_vllm_config", start)
    starting = asyncio.ensure_future(asyncio.to_thread(boot.start_processes, None, {}))
    await asyncio.to_thread(begun.wait, 10)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    goes_on.set()
    assert await asyncio.to_thread(ended.wait, 10)
    assert targets == [processes.run_engine_core]
