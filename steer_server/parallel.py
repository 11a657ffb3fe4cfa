"""Who in the server's process works on several cores: the thread that decodes, and nobody else.

Every thread that uses torch gets a team of OpenMP threads of its own, which is there until it ends. While there are
more of them than cores, all teams sleep between two operations in place of waiting awake, and waking them takes longer
than many an operation of a decoding step: a second team, idle, makes a text of a small model a quarter slower.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


async def in_own_thread(function: Callable[[], _T]) -> _T:
    """What a function returns or raises, that runs in a thread which ends with it, and its team with the thread.

    Who is cancelled does not wait for its end.
    """
    future: Future[_T] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            future.set_exception(error)

    thread = threading.Thread(target=work, name="own", daemon=True)
    thread.start()
    result = await asyncio.wrap_future(future)
    thread.join()
    return result


def others_work_on_one_core() -> None:
    """From now on torch works on one core in this thread, and in each that :func:`settle_cores` is called in.

    Call it once the engine has its threads.
    """
    import torch

    torch.set_num_threads(1)
    threads = ThreadPoolExecutor(thread_name_prefix="asyncio", initializer=settle_cores)
    asyncio.get_running_loop().set_default_executor(threads)


def settle_cores() -> None:
    """Settles on how many cores torch works in this thread: as many as was said last, now and for ever.

    Without it a thread's first product of matrices takes all cores, whatever was said.
    """
    import torch

    torch.get_num_threads()
