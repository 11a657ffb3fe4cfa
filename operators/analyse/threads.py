"""On how many cores torch computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block torch computes on one core, for what is too small to be shared out.

    Threads that wait for each other do so actively. On two busy cores, the leading triplets of a map of d = 576 took
    twenty times as many CPU seconds with two threads as with one. The count is the process's: no other thread may
    compute at the time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
