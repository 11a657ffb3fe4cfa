"""The tasks of a file of concepts, run by several processes of this machine at once.

The command that starts the workers loads the model and prepares the tasks. A worker gets both, with the weights in
memory that all of them share, then one task after the other, and says what becomes of it. Only the store is written to.
A worker that dies takes its task with it, which fails by name; another is started for the tasks that are left.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch

from operators.core.capacity import free_memory
from operators.core.errors import BuildError
from operators.core.store import Store
from operators.maps.sketch import embedding_root
from operators.model.loading import LoadedModel
from operators.model.shared import SharedBytes, pack, unpack
from operators.recipes.run import WAIT, BuildOutcome, Calibrator, TaskProgress, run_task
from operators.recipes.tasks import BuildTask

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

_GRACE = 10.0
"""Seconds that a worker has for its end, before it is killed."""


def devices_of(device: str) -> tuple[str, ...]:
    """Where workers compute, by turns: every CUDA device where ``device`` is cuda."""
    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count())) if device == "cuda" else (device,)


def share_of_memory(max_memory: int | None, devices: Sequence[str], jobs: int) -> int:
    """Bytes beside the model for each of ``jobs`` workers; ``max_memory`` None means most of what is free."""
    if max_memory is not None:
        return max_memory // jobs
    return min(free_memory(torch.device(device)) for device in devices) // math.ceil(jobs / len(devices))


def run_tasks_in_workers(
    tasks: Sequence[BuildTask],
    loaded: LoadedModel,
    store: Store,
    *,
    jobs: int,
    devices: Sequence[str],
    max_memory: int,
    progress: TaskProgress,
    calibrate: Calibrator | None = None,
) -> Generator[BuildOutcome, None, None]:
    """:func:`~operators.recipes.run.run_tasks` by ``jobs`` processes; outcomes come as they are finished.

    Args:
        loaded: on the CPU; afterwards its weights are in shared memory.
        devices: where the workers compute, by turns; each worker on another device than the CPU has its own weights.
        max_memory: bytes beside the model, for each worker.
        calibrate: of a module's top level, or a ``functools.partial`` of that: it is sent to the workers.
    """
    ready = [task for task in tasks if task.is_up_to_date]
    for task in ready:
        yield BuildOutcome(task.name, "up to date", 0.0, task.stored, None)
    waiting = deque(task for task in tasks if not task.is_up_to_date)
    if not waiting:
        return
    jobs = min(jobs, len(waiting))
    # Once, in place of once in each worker.
    root = None
    if any(task.spec.rank != "full" and task.stored is None for task in waiting):
        root = embedding_root(loaded.model.get_input_embeddings().weight)
    threads = max(1, torch.get_num_threads() // jobs)
    orders = _Orders(loaded, store, root, threads, max_memory, calibrate)
    shared = pack(orders, loaded.model)
    context = multiprocessing.get_context("forkserver")
    # What every worker imports is imported once.
    context.set_forkserver_preload([__name__, type(loaded.model).__module__])
    workers: list[_Worker] = []
    turns = itertools.cycle(devices)
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker.start(context, shared, next(turns)))
                workers[-1].give(waiting.popleft())
            for worker in _readable(workers):
                outcome, again = _answer(worker, progress)
                waiting.extend(again)
                if outcome is not None:
                    yield outcome
                _go_on(worker, workers, waiting)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.end()
        shared.close()


@dataclass(frozen=True, eq=False)
class _Orders:
    """What every worker gets when it is started."""

    loaded: LoadedModel
    store: Store
    root: torch.Tensor | None
    threads: int
    max_memory: int
    calibrate: Calibrator | None


@dataclass(eq=False)
class _Worker:
    process: ForkServerProcess
    pipe: Connection
    task: BuildTask | None = None
    """What it is at work on."""
    began: float = field(default_factory=time.monotonic)
    ended: bool = False

    @classmethod
    def start(cls, context: Any, shared: SharedBytes, device: str) -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(shared, device, theirs), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, task: BuildTask) -> None:
        self.task, self.began = task, time.monotonic()
        # One that is dead by now is noticed where it is asked for its answer.
        with suppress(OSError):
            self.pipe.send(task)

    def end(self) -> None:
        self.pipe.close()
        self.process.join(_GRACE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


def _readable(workers: Sequence[_Worker]) -> list[_Worker]:
    found = wait([worker.pipe for worker in workers])
    return [worker for worker in workers if worker.pipe in found]


def _go_on(worker: _Worker, workers: list[_Worker], waiting: deque[BuildTask]) -> None:
    """Gives a worker without a task the next one, or ends it."""
    if worker.task is not None:
        return
    if waiting and not worker.ended:
        worker.give(waiting.popleft())
    else:
        worker.end()
        workers.remove(worker)


def _answer(worker: _Worker, progress: TaskProgress) -> tuple[BuildOutcome | None, tuple[BuildTask, ...]]:
    """What a worker says: an outcome, or a task that is for later; or only how far it is."""
    task = worker.task
    assert task is not None  # noqa: S101 - for the type checker: who has no task is ended
    try:
        said = worker.pipe.recv()
    except (EOFError, OSError):
        worker.task, worker.ended = None, True
        worker.process.join(_GRACE)
        problem = BuildError(
            f"the worker process {worker.process.pid} {_how_it_ended(worker.process.exitcode)} while it was at work on "
            f"{task.name!r}; the same command builds what is not in the store"
        )
        return BuildOutcome(task.name, "failed", time.monotonic() - worker.began, None, problem), ()
    if isinstance(said, tuple):
        progress(task, *said)
        return None, ()
    worker.task = None
    return (None, (task,)) if said is None else (said, ())


def _how_it_ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    killed = " (where nobody killed it, too little memory is the usual reason)" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{killed}"


def _work(shared: SharedBytes, device: str, pipe: Connection) -> None:
    """A worker: takes tasks until there are no more, or until it is told to stop."""
    # Ctrl-C is the command's own affair, which ends its workers; these take their claims back when they end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    orders: _Orders = unpack(shared)
    torch.set_num_threads(orders.threads)
    orders.loaded.model.to(torch.device(device))

    @functools.cache
    def root() -> torch.Tensor:
        assert orders.root is not None  # noqa: S101 - for the type checker: there is one where a task needs it
        return orders.root.to(device)

    def tell(_task: BuildTask, what: str, done: int, total: int) -> None:
        pipe.send((what, done, total))

    # No more tasks, or nobody who gives them.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = pipe.recv()
            outcome = run_task(task, orders.loaded, orders.store, root, orders.max_memory, tell, orders.calibrate)
            if outcome is None:
                time.sleep(WAIT)
            pipe.send(outcome)
