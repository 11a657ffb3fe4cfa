"""How the C library keeps memory that was freed, and gives it back."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
from pathlib import Path

_M_ARENA_MAX = -8
"""As glibc's malloc.h has it."""
_ARENAS = 2
_GROWN = 1.03
_STATM = Path("/proc/self/statm")


def share_arenas() -> None:
    """Lets all threads allocate from two arenas, where the C library is glibc; call it before there are threads.

    glibc gives threads up to eight arenas a core, and what is freed in one is not there for the others: under requests
    of all sizes a server grew by a fifth that it never gave back (tests/bench/fuzz_server.py), by a tenth with two.
    ``MALLOC_ARENA_MAX`` in the environment says otherwise.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    # Another C library has no such function, or refuses the option: then its own way stays.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)


def settle() -> None:
    """Lets the garbage collector pass over what there is by now: the objects of a model's libraries stay, and going
    through all of them holds every thread up.
    """
    gc.collect()
    gc.freeze()


async def return_freed_memory(*, every: float = 5.0) -> None:
    """Gives the system back what was freed, whenever the process has grown by 3 % since. Runs until it is cancelled.

    glibc keeps freed memory that lies below some that is in use: after large requests of every kind that was an
    eighth of a small server. Nothing happens with another C library, or where the system does not say what is resident.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    low = resident_bytes()
    while trim is not None and low:
        await asyncio.sleep(every)
        if resident_bytes() > _GROWN * low:
            gc.collect()
            # Beside the event loop: other threads may allocate meanwhile.
            await asyncio.to_thread(trim, 0)
            low = resident_bytes()


def resident_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
