"""Weights in one piece of memory that many processes use, and objects that hold them, made by one for the others.

The memory is a file without a name (memfd): nobody else can write to it, and it ends with the last process that has it.
Whoever is to have it is forked after :func:`shared_memory`.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

_ALIGNED = 64
"""Bytes."""


@contextmanager
def shared_memory() -> Iterator[int]:
    """The descriptor of an empty piece of memory; processes forked meanwhile have it. What is mapped stays mapped."""
    descriptor = os.memfd_create("weights", os.MFD_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def pack(value: object, model: nn.Module, descriptor: int) -> bytes:
    """``value`` for another process, with the numbers of ``model``, a part of it, in the shared memory.

    The model's own numbers move there, so that they are in memory once.
    """
    tensors = list({id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values())
    places: dict[tuple[object, ...], int] = {}
    size = 0
    for tensor in tensors:
        if _place(tensor) not in places:
            places[_place(tensor)] = size
            size += -(-tensor.numel() * tensor.itemsize // _ALIGNED) * _ALIGNED
    # A map has at least one byte.
    os.ftruncate(descriptor, max(size, 1))
    memory = torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)
    offsets: dict[int, int] = {}
    moved: dict[tuple[object, ...], torch.Tensor] = {}
    for tensor in tensors:
        place = _place(tensor)
        if place not in moved:
            moved[place] = _view(memory, places[place], tensor.dtype, tuple(tensor.shape)).copy_(tensor.detach())
        offsets[id(tensor)] = places[place]
        tensor.data = moved[place]
    pickled = io.BytesIO()
    _Pickler(pickled, offsets).dump(value)
    return pickled.getvalue()


def unpack(pickled: bytes, descriptor: int) -> Any:
    """The object, with weights of its own as far as it writes to them, and else the shared ones.

    Of processes that are forked afterwards each has its own in that sense.
    """
    # Written to, a page becomes this process's own.
    memory = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE)
    return _Unpickler(io.BytesIO(pickled), torch.frombuffer(memory, dtype=torch.uint8)).load()


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _view(memory: torch.Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    numbers = torch.Size(shape).numel()
    return memory[offset : offset + numbers * dtype.itemsize].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, offsets: dict[int, int]) -> None:
        super().__init__(file)
        self._offsets = offsets

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or id(value) not in self._offsets:
            return None
        is_parameter = isinstance(value, torch.nn.Parameter)
        return id(value), self._offsets[id(value)], value.dtype, tuple(value.shape), is_parameter


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, memory: torch.Tensor) -> None:
        super().__init__(file)
        self._memory = memory
        # By the id in the other process: a tensor with two names stays one.
        self._found: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: Any) -> torch.Tensor:
        key, offset, dtype, shape, is_parameter = pid
        if key not in self._found:
            tensor = _view(self._memory, offset, dtype, shape)
            self._found[key] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        return self._found[key]
