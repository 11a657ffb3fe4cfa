"""How much memory is free, errors where it is not enough, and sizes as text."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from operators.core.cgroup import memory_left
from operators.core.errors import BuildError

if TYPE_CHECKING:
    # Parsing a size must not import torch.
    import torch

_SHARE_OF_FREE = 0.8
_CPU_IS_FULL = "can't allocate memory"
"""Torch raises a plain RuntimeError with this text where the CPU has no memory left."""
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def free_memory(device: torch.device) -> int:
    """Bytes that a build may use on ``device`` by default: most of what is free."""
    if device.type == "cuda":
        import torch

        if not torch.cuda.is_available():
            # Of a plan for another machine, which has a bound of its own.
            return sys.maxsize
        return int(_SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0])
    return int(_SHARE_OF_FREE * available_memory())


def available_memory() -> int:
    """Bytes of the machine, or of the container, that are not taken; what files are cached in is not."""
    left = memory_left()
    return _available() if left is None else min(left, _available())


@contextmanager
def memory_errors_as_build_errors() -> Iterator[None]:
    """Translates the errors of Python and torch for too little memory; others pass.

    Raises :class:`BuildError`, with the amount that was needed where torch names it.
    """
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU_IS_FULL in str(error)):
            raise
        amount = re.search(r"allocate (\d[\d.]*) (\w+)", str(error))
        needed = f": {amount[1]} {amount[2]} more are needed" if amount else ""
        raise BuildError(
            f"there is not enough memory{needed}; a lower rank, shorter or fewer texts, or a smaller --max-memory "
            "needs less"
        ) from error


def parse_bytes(text: str) -> int:
    """``"8GiB"``, ``"500 MB"``, ``"4g"`` or a number of bytes; units are powers of 1024. Raises :class:`BuildError`."""
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise BuildError(f"memory {text!r}; a size such as 8GiB or 500MB is accepted")
    return size


def format_bytes(size: int) -> str:
    """1536 -> ``"1.5 KiB"``."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def _available() -> int:
    # The kernel estimates what can be allocated without swapping; where it does not, the unused pages.
    try:
        with open("/proc/meminfo") as file:
            found = re.search(r"^MemAvailable:\s+(\d+) kB", file.read(), re.MULTILINE)
        if found:
            return int(found[1]) << 10
    except OSError:
        pass
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)
