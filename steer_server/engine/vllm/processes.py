"""vLLM's processes: out of reach of signals to the server's process group, and gone when the server is.

Ctrl-C in a terminal, and whoever signals a process group, reach every process of it. vLLM's engine core ends all
requests at once when it is told to end, while the server still finishes them within its grace period. So the engine
core gets a session, and with it a process group, of its own; the workers that it starts are in it too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.engine.core import EngineCoreProc

_LAST_SECONDS = 10.0
"""For an orderly end after the server's."""
_run = EngineCoreProc.run_engine_core


@contextmanager
def session_of_their_own() -> Iterator[None]:
    """Around the start of vLLM: its engine core runs :func:`run_engine_core`, whether forked or spawned."""
    # Named by vLLM as the target of the process that it is about to start.
    EngineCoreProc.run_engine_core = staticmethod(run_engine_core)
    try:
        yield
    finally:
        EngineCoreProc.run_engine_core = staticmethod(_run)


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """The engine core's process from its first moment to its end."""
    os.setsid()
    threading.Thread(target=_end_after_the_server, name="end-after-the-server", daemon=True).start()
    _run(*args, **kwargs)


def _end_after_the_server() -> None:
    server = multiprocessing.parent_process()
    if server is None:
        return
    server.join()
    # Killed, or ended without a word to vLLM: nobody else would end this process and its workers.
    os.killpg(0, signal.SIGTERM)
    time.sleep(_LAST_SECONDS)
    os.killpg(0, signal.SIGKILL)
