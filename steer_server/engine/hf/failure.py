"""Errors after which nothing can be decoded any more."""

from __future__ import annotations

import asyncio
import re
import threading

import torch

_OF_DEVICE = re.compile(r"\b(CUDA|HIP|XPU|MPS|cuDNN|CUBLAS|NCCL)\b.*\b(error|failed|failure|STATUS\w*)", re.IGNORECASE)


def is_lost(error: Exception, device: torch.device) -> bool:
    """Whether a device can compute nothing any more after an error: a fault of its driver stays until the process ends.

    Too little memory is no such fault.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return False
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and _OF_DEVICE.search(str(error))):
        return True
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError:
        return True
    return False


class Failure:
    """A reason that any thread sets once, and that the event loop waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[str]]] = []

    def set(self, reason: str) -> None:
        """The first reason stays."""
        with self._lock:
            self._reason = self._reason or reason
            for loop, future in self._waiting:
                loop.call_soon_threadsafe(_resolve, future, self._reason)
            self._waiting.clear()

    async def wait(self) -> str:
        """The reason, once there is one."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[str] = loop.create_future()
        with self._lock:
            if self._reason is not None:
                return self._reason
            self._waiting.append((loop, future))
        return await future


def _resolve(future: asyncio.Future[str], reason: str) -> None:
    if not future.done():
        future.set_result(reason)
