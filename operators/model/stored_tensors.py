"""Single tensors of safetensors files, read past the system's cache where the file system allows it.

A pass over a model that is larger than the memory would turn the cache over and find nothing in it, and would be slower
for that. Nothing is mapped: a file that is cut short meanwhile is an error, and does not end the program.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from operators.core.errors import ModelError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
_AT_ONCE = 1 << 30
"""Bytes of one read: Linux reads no more than 2 GiB."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is. Filled by :func:`stored_tensors`."""

    model: str
    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """From the beginning of the file."""

    def read(self) -> torch.Tensor:
        """Its numbers, on the CPU. Raises :class:`ModelError` where the file cannot be read."""
        count = math.prod(self.shape)
        begin = self.offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = self.offset + count * self.dtype.itemsize
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        # Of whole pages, which is what reads past the cache want.
        size = math.ceil((end - begin) / mmap.PAGESIZE) * mmap.PAGESIZE
        buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            _fill(self.file, memoryview(buffer), begin, end - begin)
        except OSError as error:
            raise ModelError(f"model {self.model!r}: {self.file.name} cannot be read: {error}") from error
        place = self.offset - begin
        if place % self.dtype.itemsize:
            return torch.frombuffer(bytearray(buffer[place : end - begin]), dtype=self.dtype).view(self.shape)
        return torch.frombuffer(buffer, dtype=self.dtype, count=count, offset=place).view(self.shape)


def stored_tensors(model: str, file: Path) -> list[StoredTensor]:
    """Every tensor of a file, by its header. Raises :class:`ModelError` where that is damaged."""
    try:
        with safe_open(file, framework="pt"):
            # The library checks that the header and the file agree; it does not say where tensors begin.
            content = file.open("rb")
        with content:
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
        return [
            StoredTensor(
                *(model, file, key, _DTYPES[entry["dtype"]], tuple(entry["shape"])),
                offset=8 + length + entry["data_offsets"][0],
            )
            for key, entry in header.items()
            if key != "__metadata__"
        ]
    except KeyError as error:
        raise ModelError(
            f"model {model!r}: {file.name} has numbers of the kind {error}; {', '.join(_DTYPES)} are streamed"
        ) from error
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ModelError(f"model {model!r}: {file.name} is no whole safetensors file ({error})") from error


def _fill(file: Path, buffer: memoryview, begin: int, needed: int) -> None:
    """Reads ``needed`` bytes or more from ``begin``, the beginning of a page."""
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        descriptor = os.open(file, os.O_RDONLY)
    try:
        done = 0
        while done < needed:
            read = os.preadv(descriptor, [buffer[done : done + _AT_ONCE]], begin + done)
            if read == 0:
                raise OSError(f"it ends at byte {begin + done}")
            # Reads past the cache begin at a page: what is short of one is read again.
            done += read if done + read >= needed else read // mmap.PAGESIZE * mmap.PAGESIZE
    finally:
        os.close(descriptor)
