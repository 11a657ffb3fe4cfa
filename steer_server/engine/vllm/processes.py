"""vLLM's processes: out of reach of signals to the server's process group, and gone when the server is.

Ctrl-C in a terminal, and whoever signals a process group, reach every process of it. vLLM's engine core ends all
requests at once on such a signal, while the server still finishes them within its grace period. So the engine core gets
a session, and with it a process group, of its own; the workers that it starts are in it too.
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

from steer_server.engine.vllm.start_problem import reports_problems

_TERMINATE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL, once the server has ended."""
_original_run_engine_core = EngineCoreProc.run_engine_core


@contextmanager
def engine_core_in_its_own_session() -> Iterator[None]:
    """Around the start of vLLM: its engine core runs :func:`run_engine_core`, whether forked or spawned."""
    # vLLM passes this attribute as the target of the process that it is about to start.
    EngineCoreProc.run_engine_core = staticmethod(run_engine_core)
    try:
        yield
    finally:
        EngineCoreProc.run_engine_core = staticmethod(_original_run_engine_core)


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """The engine core's process from its first moment to its end."""
    os.setsid()
    threading.Thread(target=_end_after_the_server, name="end-after-the-server", daemon=True).start()
    reports_problems(_original_run_engine_core)(*args, **kwargs)


def _end_after_the_server() -> None:
    server = multiprocessing.parent_process()
    if server is None:
        return
    server.join()
    # The server was killed, or ended without shutting vLLM down: nothing else would end this process and its workers.
    os.killpg(0, signal.SIGTERM)
    time.sleep(_TERMINATE_SECONDS)
    os.killpg(0, signal.SIGKILL)
