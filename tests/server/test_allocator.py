import asyncio
import ctypes
import os
import subprocess
import sys

import pytest

from steer_server.allocator import resident_bytes, return_freed_memory

COUNT = """
import threading, ctypes
from steer_server.allocator import share_arenas
share_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
gate, addresses = threading.Barrier(12), []
def allocate():
    gate.wait()
    addresses.append(libc.malloc(5000))
    gate.wait()
threads = [threading.Thread(target=allocate) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
# Arenas other than the first are 64 MiB of addresses each.
print(len({address >> 26 for address in addresses}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
@pytest.mark.parametrize(("own", "expected"), [(None, range(1, 3)), ("12", range(3, 13))])
def test_threads_share_two_arenas_unless_the_environment_says_otherwise(own, expected):
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    if own is not None:
        environment["MALLOC_ARENA_MAX"] = own
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) in expected


async def test_what_was_freed_below_what_is_in_use_goes_back_to_the_system():
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("of glibc")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    before = resident_bytes()
    returning = asyncio.ensure_future(return_freed_memory(every=0.01))
    await asyncio.sleep(0)
    pieces = [libc.malloc(100_000) for _ in range(3000)]
    for piece in pieces:
        ctypes.memset(piece, 1, 100_000)
    assert resident_bytes() > before + 250_000_000
    for piece in pieces[:-1]:
        libc.free(piece)
    async with asyncio.timeout(30):
        while resident_bytes() > before + 50_000_000:
            await asyncio.sleep(0.01)
    libc.free(pieces[-1])
    returning.cancel()
