"""A sha256 over every number of a model, by the name of its tensor.

A number counts by its value, not by how it is kept: a block of numbers is hashed in the narrowest of bfloat16, float32
and float64 that holds all of them exactly. So a model in float32 whose numbers came from a bfloat16 checkpoint has the
digest of that checkpoint, in one file or in many. Numbers that were rounded are others, and have another digest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = 1 << 22
"""Numbers hashed by one thread at a time: it bounds the copies in memory, and lets threads share a large tensor."""
_THREADS = 8
_HIGH_HALF = 16
"""Bits by which a float32 is shifted to give the bfloat16 of its upper half."""


TensorDigest = tuple[tuple[int, ...], bytes]
"""The shape of a tensor, and the digests of its blocks one after the other."""


def weights_digest(model: PreTrainedModel) -> str:
    """64 hexadecimal digits over every parameter and every buffer that belongs to a checkpoint.

    A tensor that has two names counts under both. Buffers that a model works out from its configuration are not
    numbers of its checkpoint, and do not count.
    """
    return combined_digest(tensor_digests({name: tensor.detach() for name, tensor in model.state_dict().items()}))


def tensor_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorDigest]:
    """The digest of each tensor by its name."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        # Tied tensors are one piece of memory with two names: it is read once.
        digests = {
            _place(tensor): [threads.submit(_block_digest, block) for block in _blocks(tensor.detach())]
            for tensor in tensors.values()
        }
        return {
            name: (tuple(tensor.shape), b"".join(digest.result() for digest in digests[_place(tensor)]))
            for name, tensor in tensors.items()
        }


def combined_digest(tensors: Mapping[str, TensorDigest]) -> str:
    """The digest of a model of these tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        shape, blocks = tensors[name]
        total.update(f"{name} {shape} {len(blocks)}\n".encode() + blocks)
    return total.hexdigest()


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(torch.split(tensor.reshape(-1), _BLOCK))


def _block_digest(block: torch.Tensor) -> bytes:
    numbers = _narrowest(block.cpu().contiguous())
    digest = hashlib.sha256(f"{numbers.dtype}\n".encode())
    digest.update(numbers.view(torch.uint8).numpy().data)
    return digest.digest()


def _narrowest(numbers: torch.Tensor) -> torch.Tensor:
    """The same numbers, bit for bit, in the narrowest of three dtypes; those that are no such numbers as they are.

    Bits are compared, not values: zeros keep their sign, and what is not a number its kind.
    """
    if numbers.dtype == torch.float16:
        numbers = numbers.float()
    if numbers.dtype == torch.float64:
        single = numbers.float()
        if not torch.equal(single.double().view(torch.int64), numbers.view(torch.int64)):
            return numbers
        numbers = single
    if numbers.dtype == torch.float32:
        bits = numbers.view(torch.int32)
        if not bool((bits & ((1 << _HIGH_HALF) - 1)).any()):
            return (bits >> _HIGH_HALF).to(torch.int16).view(torch.bfloat16)
    return numbers
