"""Sending an operator to the workers: in chunks, between which the tokens of other requests are decoded.

A worker copies each chunk to its place as it comes. Once complete, the operator is verified and prepared in a thread,
beside the engine's steps; the first call that finds it prepared makes it usable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from math import prod

import torch

from operators.core.apply import PreparedOperator, prepare
from operators.core.artifact import OperatorArtifact, assemble, tensors_of
from operators.core.dtypes import DTYPES
from operators.core.header import DTypeName
from steer_server.engine.vllm.worker_protocol import WorkerCall

TensorLayout = tuple[str, DTypeName, Sequence[tuple[str, Sequence[int]]]]
"""The header as it was signed, the dtype, and each tensor's name and shape, in the order of their bytes."""

CHUNK_BYTES = 8 << 20
"""Per call: the engine's next step waits while they are copied. Below the 16 MiB up to which vLLM hands a call to its
workers in shared memory."""
_POLL_SECONDS = 0.02
_LAST_CHUNK_SECONDS = 0.005
"""How long the call with the last chunk waits for the operator to be prepared, which spares small ones another call."""


class OperatorSender:
    """The server's end."""

    def __init__(self, call: WorkerCall) -> None:
        self._call = call
        self._one_chunk_at_a_time = asyncio.Lock()

    async def send(self, artifact: OperatorArtifact) -> None:
        """Returns when every worker can use the operator. If anything fails, no worker keeps any part of it."""
        digest, tensors = artifact.digest, tensors_of(artifact)
        shapes = [(name, list(tensor.shape)) for name, tensor in tensors.items()]
        layout: TensorLayout = (artifact.header_json, artifact.header.dtype, shapes)
        try:
            offset, ready = 0, [False]
            for data in _chunks(tensors.values(), CHUNK_BYTES):
                # However many operators are being sent, a step of the engine waits for one chunk at most.
                async with self._one_chunk_at_a_time:
                    ready = list(await self._call("steering_load", digest, offset, data, None if offset else layout))
                offset += len(data)
            while not all(ready):
                await asyncio.sleep(_POLL_SECONDS)
                ready = list(await self._call("steering_load", digest, offset, b"", None))
        except BaseException:
            with suppress(Exception):
                await asyncio.shield(asyncio.ensure_future(self._call("steering_unload", [digest])))
            raise


def _chunks(tensors: Iterable[torch.Tensor], size: int) -> Iterator[bytes]:
    """The bytes of all tensors, one after the other, ``size`` at a time."""
    parts: list[memoryview] = []
    missing = size
    for tensor in tensors:
        rest = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        while rest:
            parts.append(rest[:missing])
            rest = rest[missing:]
            missing -= len(parts[-1])
            if not missing:
                yield b"".join(parts)
                parts, missing = [], size
    if parts:
        yield b"".join(parts)


class _IncomingOperator:
    def __init__(self, digest: str, layout: TensorLayout) -> None:
        header, dtype_name, shapes = layout
        self._digest, self._header = digest, header
        dtype = DTYPES[dtype_name]
        sizes = [prod(shape) * dtype.itemsize for _, shape in shapes]
        # One buffer, which in float32 becomes the operator's own memory; the system assigns its pages as they are
        # written.
        self._buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        parts = torch.split(self._buffer, sizes)
        self._tensors = {name: part.view(dtype).view(*shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        self._num_received = 0
        self.preparing: Future[tuple[PreparedOperator, int]] | None = None

    def add(self, offset: int, data: bytes) -> bool:
        """Adds a chunk; whether all have come."""
        if offset != self._num_received or offset + len(data) > len(self._buffer):
            raise ValueError(
                f"operator {self._digest}: {len(data)} bytes came for offset {offset}; {self._num_received} of "
                f"{len(self._buffer)} bytes have been received"
            )
        if data:
            # Copied by numpy: torch warns of immutable bytes.
            self._buffer.numpy().data[offset : offset + len(data)] = data
        self._num_received += len(data)
        return self._num_received == len(self._buffer)

    def prepare(self) -> tuple[PreparedOperator, int]:
        """The operator on the CPU and its layer. Raises :class:`ArtifactError` if it is damaged."""
        artifact = assemble(self._header, self._tensors, digest=self._digest, source=self._digest)
        return prepare(artifact, torch.device("cpu")), artifact.header.injection_layer


class IncomingOperators:
    """A worker's end: operators that have not arrived completely, or are being prepared."""

    def __init__(self) -> None:
        self._incoming: dict[str, _IncomingOperator] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="operators")

    def __len__(self) -> int:
        return len(self._incoming)

    def __contains__(self, digest: str) -> bool:
        return digest in self._incoming

    def receive(
        self, digest: str, offset: int, data: bytes, layout: TensorLayout | None
    ) -> tuple[PreparedOperator, int] | None:
        """Takes a chunk, the first one with the layout; without data it only asks whether the operator is prepared.

        Returns:
            The operator, on the CPU, and its layer, once; None until then.

        Raises:
            ValueError: a chunk that is not the next one.
            ArtifactError, SteeringError: the bytes are not those of that operator, or it has no direction.
        """
        if layout is not None:
            self._incoming[digest] = _IncomingOperator(digest, layout)
        incoming = self._incoming.get(digest)
        if incoming is None:
            raise ValueError(f"operator {digest}: its first chunk has not been received")
        try:
            if not incoming.add(offset, data):
                return None
            incoming.preparing = incoming.preparing or self._thread.submit(incoming.prepare)
            prepared = incoming.preparing.result(timeout=_LAST_CHUNK_SECONDS if data else 0.0)
        except TimeoutError:
            return None
        except BaseException:
            self.drop(digest)
            raise
        self.drop(digest)
        return prepared

    def drop(self, digest: str) -> None:
        """Forgets what has been received of an operator."""
        self._incoming.pop(digest, None)
