"""How the C library keeps memory that was freed."""

from __future__ import annotations

import ctypes
import os

_M_ARENA_MAX = -8
"""As glibc's malloc.h has it."""
_ARENAS = 2


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
