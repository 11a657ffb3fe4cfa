"""The tasks of a file of concepts, run by several processes of this machine at once.

The command imports torch and transformers, and is forked: into a process that loads the model and prepares the tasks
(:func:`prepare_apart`), and then into workers, which so have all of that, with the weights in memory that they share.
A worker gets one task after the other, and says what becomes of it. Only the store is written to. A worker that dies
takes its task with it, which fails by name; another is started for the tasks that are left.

A process can be forked as long as it has no threads that hold something. So the command itself computes nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

import torch

# What the modules of models import: once, before this process is forked.
import transformers.modeling_layers  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from operators.core.capacity import free_memory
from operators.core.errors import BuildError
from operators.core.store import Store
from operators.maps.sketch import embedding_root
from operators.model.loading import LoadedModel
from operators.model.shared import pack, shared_memory, unpack
from operators.recipes.run import WAIT, BuildOutcome, Calibrator, TaskProgress, run_task
from operators.recipes.tasks import BuildTask

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

_FORK = multiprocessing.get_context("fork")
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


@dataclass(frozen=True, eq=False)
class Prepared:
    """What there is to do, and with what. Filled by who loads the model."""

    loaded: LoadedModel
    """On the CPU where workers are to have it."""
    tasks: tuple[BuildTask, ...]
    devices: tuple[str, ...]
    """Where the workers compute, by turns; each worker on another device than the CPU has its own weights."""
    max_memory: int | None
    """Bytes beside the model, for each worker; None means most of what is free."""
    root: torch.Tensor | None = None
    """C^{1/2} of :func:`~operators.maps.sketch.embedding_root`, where a task needs it: :func:`root_for`."""


def root_for(tasks: Sequence[BuildTask], loaded: LoadedModel) -> torch.Tensor | None:
    """Computed once, in place of once in each worker; None where no task needs it."""
    if any(task.spec.rank != "full" and task.stored is None for task in tasks):
        return embedding_root(loaded.model.get_input_embeddings().weight)
    return None


def prepare_apart(prepare: Callable[[], Prepared], *, shown: AbstractContextManager[None] | None = None) -> Prepared:
    """What ``prepare`` returns, by a process of its own: it computes, and so leaves threads behind.

    Args:
        shown: entered while that process is waited for; threads that it starts are after the fork.

    Raises:
        BuildError: that process died.
        Exception: what ``prepare`` raises.
    """
    with shared_memory() as descriptor:
        ours, theirs = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=_prepare, args=(prepare, descriptor, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            with shown or nullcontext():
                said = ours.recv()
        except EOFError:
            process.join(_GRACE)
            raise BuildError(f"the process that loads the model {_how_it_ended(process.exitcode)}") from None
        finally:
            ours.close()
            process.terminate()
            process.join()
        if isinstance(said, Exception):
            raise said
        prepared: Prepared = unpack(said, descriptor)
    return prepared


def _prepare(prepare: Callable[[], Prepared], descriptor: int, pipe: Connection) -> None:
    # Ctrl-C is the command's own affair.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        prepared = prepare()
        said: object = pack(prepared, prepared.loaded.model, descriptor)
    except Exception as error:  # noqa: BLE001 - whatever it is, the command raises it
        error.add_note(traceback.format_exc())
        said = error
    with suppress(BrokenPipeError):
        pipe.send(said)


def run_tasks_in_workers(
    prepared: Prepared,
    store: Store,
    *,
    jobs: int,
    progress: TaskProgress,
    calibrate: Calibrator | None = None,
) -> Generator[BuildOutcome, None, None]:
    """:func:`~operators.recipes.run.run_tasks` by ``jobs`` processes; outcomes come as they are finished.

    For a process in which torch has started no threads: see the module.
    """
    ready = [task for task in prepared.tasks if task.is_up_to_date]
    for task in ready:
        yield BuildOutcome(task.name, "up to date", 0.0, task.stored, None)
    waiting = deque(task for task in prepared.tasks if not task.is_up_to_date)
    if not waiting:
        return
    jobs = min(jobs, len(waiting))
    orders = _Orders(prepared, store, max(1, torch.get_num_threads() // jobs), calibrate)
    workers: list[_Worker] = []
    turns = itertools.cycle(prepared.devices)
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker.start(orders, next(turns), [worker.pipe for worker in workers]))
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


@dataclass(frozen=True, eq=False)
class _Orders:
    """What every worker has when it is started."""

    prepared: Prepared
    store: Store
    threads: int
    calibrate: Calibrator | None


@dataclass(eq=False)
class _Worker:
    process: ForkProcess
    pipe: Connection
    task: BuildTask | None = None
    """What it is at work on."""
    began: float = field(default_factory=time.monotonic)
    ended: bool = False

    @classmethod
    def start(cls, orders: _Orders, device: str, others: Sequence[Connection]) -> _Worker:
        """``others``: the pipes of the other workers, which this one does not keep open when the command ends."""
        ours, theirs = _FORK.Pipe()
        process = _FORK.Process(target=_work, args=(orders, device, theirs, (ours, *others)), daemon=True)
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


def _work(orders: _Orders, device: str, pipe: Connection, not_its_own: Sequence[Connection]) -> None:
    """A worker: takes tasks until there are no more, or until it is told to stop."""
    # Ctrl-C is the command's own affair, which ends its workers; these take their claims back when they end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for other in not_its_own:
        other.close()
    torch.set_num_threads(orders.threads)
    prepared = orders.prepared
    prepared.loaded.model.to(torch.device(device))

    @functools.cache
    def root() -> torch.Tensor:
        assert prepared.root is not None  # noqa: S101 - for the type checker: there is one where a task needs it
        return prepared.root.to(device)

    def tell(_task: BuildTask, what: str, done: int, total: int) -> None:
        pipe.send((what, done, total))

    # No more tasks, or nobody who gives them.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = pipe.recv()
            outcome = run_task(
                *(task, prepared.loaded, orders.store, root, prepared.max_memory, tell, orders.calibrate)
            )
            if outcome is None:
                time.sleep(WAIT)
            pipe.send(outcome)
