"""What this machine does in a second, measured in a few: for plans of builds."""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

_LARGEST = 1 << 24
"""Numbers of the weight that is multiplied with."""
_FEW = 8
_READ = 16 << 20
_ASSUMED_READ = 1e9
"""Bytes in a second, where there is no file to read."""


@dataclass(frozen=True)
class Machine:
    """Filled by :func:`measure_machine`. Each is so much in a second."""

    start: float
    """Seconds that a program of these modules takes to start."""
    flop: float
    """FLOP of a GEMM of a block's shape, with as many rows as a pass has."""
    flop_double: float
    """The same in float64."""
    weights: float
    """Bytes of weights that a product of a few rows goes through."""
    cast: float
    """Bytes of numbers that are copied from the files' dtype."""
    read: float
    """Bytes read from the files where the system does not hold them."""
    hashed: float
    """Bytes of which the digest is taken."""


def measure_machine(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, stored: torch.dtype, files: Iterable[Path], *, start: float
) -> Machine:
    """For products of ``rows`` rows with a weight of ``shape`` (out, in), and files of ``stored`` numbers."""
    inner = min(shape[1], 1 << 13)
    weight = torch.randn(min(shape[0], _LARGEST // inner), inner).to(dtype)
    x, few = torch.randn(rows, inner).to(dtype), torch.randn(_FEW, inner).to(dtype)
    back = x @ weight.T
    there_and_back = _seconds(lambda: (x @ weight.T, back @ weight))
    side = min(768, inner)
    tall = torch.randn(8 * side, side, dtype=torch.float64)
    numbers = torch.zeros(1 << 24, dtype=stored)
    content = bytes(1 << 25)
    threads = min(8, os.cpu_count() or 1)
    return Machine(
        start=start,
        flop=4 * rows * weight.numel() / there_and_back,
        flop_double=2 * tall.shape[0] * side**2 / _seconds(lambda: tall.T @ tall),
        weights=weight.numel() * weight.itemsize / _seconds(lambda: few @ weight.T),
        cast=numbers.numel() * dtype.itemsize / _seconds(lambda: numbers.to(dtype, copy=True)),
        read=_read_speed(files),
        hashed=threads * len(content) / _seconds(lambda: hashlib.sha256(content).digest()),
    )


def _seconds(work: Callable[[], object]) -> float:
    """The better of two runs."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


def _read_speed(files: Iterable[Path]) -> float:
    """Of the largest file, past the system's cache where the file system allows it."""
    there = [file for file in files if file.is_file()]
    if not there:
        return _ASSUMED_READ
    file = max(there, key=lambda path: path.stat().st_size)
    size = file.stat().st_size
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        return _ASSUMED_READ
    try:
        with mmap.mmap(-1, _READ) as buffer:
            start, done = time.perf_counter(), 0
            for place in range(4):
                offset = (size * place // 4) // mmap.PAGESIZE * mmap.PAGESIZE
                done += os.preadv(descriptor, [buffer], offset)
            return max(done, 1) / max(time.perf_counter() - start, 1e-9)
    except OSError:
        return _ASSUMED_READ
    finally:
        os.close(descriptor)
