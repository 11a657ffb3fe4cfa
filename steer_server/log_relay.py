"""Standard error and standard output that never hold anybody up.

A write to a pipe that nobody reads waits for ever, and takes the event loop with it. So both descriptors are replaced
by pipes of our own, which a thread always empties; another hands on what came to where they led before. What does not
fit in between is dropped, and counted. That holds for whoever writes: logs, warnings, C++, and child processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import sys
import termios
import threading
import time
from collections import deque

_CHUNK = 1 << 16
_LIMIT = 1 << 20
"""Bytes that wait at most."""


class LogRelay:
    """Takes the place of one descriptor. Nothing written to it blocks, or fails because its reader has gone."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._target = os.dup(descriptor)
        self._source, entrance = os.pipe()
        os.dup2(entrance, descriptor)
        os.close(entrance)
        self._chunks: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._waiting = 0
        self._lost = 0
        for work in (self._read, self._write):
            threading.Thread(target=work, name=f"relay-{descriptor}", daemon=True).start()

    def drain(self, seconds: float) -> None:
        """Returns when all has been handed on, and gives back the descriptor; or after so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with self._changed:
                if not (_unread(self._source) or self._waiting):
                    os.dup2(self._target, self._descriptor)
                    return
            time.sleep(0.005)

    def _read(self) -> None:
        while True:
            # Read while the lock is held: in between, what has left the pipe would not be counted as waiting yet.
            select.select([self._source], [], [])
            with self._changed:
                chunk = os.read(self._source, _CHUNK)
                if self._waiting + len(chunk) > _LIMIT:
                    self._lost += chunk.count(b"\n")
                    continue
                self._chunks.append(chunk)
                self._waiting += len(chunk)
                self._changed.notify()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._chunks)
                chunk, lost = self._chunks.popleft(), self._lost
            # Only then: here it may wait for ever, or find that its reader has gone.
            with contextlib.suppress(OSError):
                _write_all(self._target, chunk)
                if lost:
                    _write_all(self._target, f"steer-server: {lost} lines were dropped: nobody read them\n".encode())
            with self._changed:
                self._waiting -= len(chunk)
                self._lost -= lost


def relay_output() -> tuple[LogRelay, ...]:
    """Relays standard output and standard error, where they are open."""
    relays = []
    for descriptor in (1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Closed by who started this process: a file that is opened next must not take its place.
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        relays.append(LogRelay(descriptor))
    # Python has none where the descriptor was closed.
    sys.stdout = sys.stdout or os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", buffering=1, closefd=False)
    return tuple(relays)


def drain_output(relays: tuple[LogRelay, ...], seconds: float = 1.0) -> None:
    """Hands on what has been written, for so long at most: a reader that does not read must not keep us here."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    for relay in relays:
        relay.drain(seconds)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            # Whoever shares it has made it one that does not wait, and it is full: no line is lost for that.
            select.select([], [descriptor], [])


def _unread(descriptor: int) -> int:
    size = fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4)
    return int.from_bytes(size, sys.byteorder)
