"""An operator's way to the workers: in pieces, between which the tokens of other requests are decoded.

A worker copies each piece to its place as it comes. Once whole, the operator is verified and made ready in a thread,
beside the steps, and known from the call on that finds it ready.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from math import prod
from typing import Any

import torch

from operators.core.apply import PreparedOperator, prepare
from operators.core.artifact import OperatorArtifact, assemble, tensors_of
from operators.core.header import DTYPES

Rpc = Callable[..., Awaitable[Sequence[Any]]]
"""``rpc(method, *args)``: what every worker answers."""
Layout = tuple[str, str, Sequence[tuple[str, Sequence[int]]]]
"""The header as it was signed, the dtype, and each tensor's name and shape, in the order of their bytes."""

PIECE = 8 << 20
"""Bytes of a call: a step waits as long as it takes to copy them. What vLLM hands to its workers in shared memory is
smaller than 16 MiB."""
_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 0.005
"""How long the last piece waits for the operator to become ready: a small one is by then."""


class Sender:
    """The server's end."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._turn = asyncio.Lock()

    async def send(self, artifact: OperatorArtifact) -> None:
        """Returns when every worker has the operator ready. Otherwise none keeps anything of it."""
        digest, tensors = artifact.digest, tensors_of(artifact)
        shapes = [(name, list(tensor.shape)) for name, tensor in tensors.items()]
        layout: Layout = (artifact.header_json, artifact.header.dtype, shapes)
        try:
            at, ready = 0, [False]
            for data in _pieces(tensors.values(), PIECE):
                # However many operators are on their way, a step waits for one piece.
                async with self._turn:
                    ready = list(await self._rpc("steering_load", digest, at, data, None if at else layout))
                at += len(data)
            while not all(ready):
                await asyncio.sleep(_POLL_SECONDS)
                ready = list(await self._rpc("steering_load", digest, at, b"", None))
        except BaseException:
            with suppress(Exception):
                await asyncio.shield(asyncio.ensure_future(self._rpc("steering_unload", [digest])))
            raise


def _pieces(tensors: Iterable[torch.Tensor], size: int) -> Iterator[bytes]:
    """The bytes of all tensors, one after the other, ``size`` at a time."""
    parts: list[memoryview] = []
    room = size
    for tensor in tensors:
        whole = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        while whole:
            parts.append(whole[:room])
            whole = whole[room:]
            room -= len(parts[-1])
            if not room:
                yield b"".join(parts)
                parts, room = [], size
    if parts:
        yield b"".join(parts)


class _Arrival:
    def __init__(self, digest: str, layout: Layout) -> None:
        header, dtype, shapes = layout
        self._digest, self._header = digest, header
        kind = DTYPES[dtype]
        sizes = [prod(shape) * kind.itemsize for _, shape in shapes]
        # One block, in float32 that of the operator itself; a page of it is taken when its piece comes.
        self._buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        parts = torch.split(self._buffer, sizes)
        self._tensors = {name: part.view(kind).view(*shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        self._there = 0
        self.checking: Future[tuple[PreparedOperator, int]] | None = None

    def add(self, at: int, data: bytes) -> bool:
        """Whether all has come."""
        if at != self._there or at + len(data) > len(self._buffer):
            raise ValueError(
                f"operator {self._digest}: {len(data)} bytes came for place {at}; {self._there} of "
                f"{len(self._buffer)} are there"
            )
        if data:
            # Not by way of torch: it warns of bytes, which cannot be written.
            self._buffer.numpy().data[at : at + len(data)] = data
        self._there += len(data)
        return self._there == len(self._buffer)

    def check(self) -> tuple[PreparedOperator, int]:
        """The operator on the CPU and its layer. Raises :class:`ArtifactError` if it is damaged."""
        artifact = assemble(self._header, self._tensors, digest=self._digest, source=self._digest)
        return prepare(artifact, torch.device("cpu")), artifact.header.injection_layer


class Arrivals:
    """A worker's end: operators that are on their way."""

    def __init__(self) -> None:
        self._arriving: dict[str, _Arrival] = {}
        self._checker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="operators")

    def __len__(self) -> int:
        return len(self._arriving)

    def __contains__(self, digest: str) -> bool:
        return digest in self._arriving

    def take(self, digest: str, at: int, data: bytes, layout: Layout | None) -> tuple[PreparedOperator, int] | None:
        """Takes a piece, the first one with the layout; without bytes it asks whether the operator is ready.

        Returns:
            The operator, on the CPU, and its layer, once; None until then.

        Raises:
            ValueError: a piece that is not the next one.
            ArtifactError, SteeringError: what came is not that operator, or has no direction.
        """
        if layout is not None:
            self._arriving[digest] = _Arrival(digest, layout)
        arrival = self._arriving.get(digest)
        if arrival is None:
            raise ValueError(f"operator {digest}: no beginning of it has come")
        try:
            if not arrival.add(at, data):
                return None
            arrival.checking = arrival.checking or self._checker.submit(arrival.check)
            found = arrival.checking.result(timeout=_PATIENCE_SECONDS if data else 0.0)
        except TimeoutError:
            return None
        except BaseException:
            self.drop(digest)
            raise
        self.drop(digest)
        return found

    def drop(self, digest: str) -> None:
        """Forgets what has come of an operator."""
        self._arriving.pop(digest, None)
