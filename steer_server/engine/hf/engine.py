"""The embedded engine: a transformers model in this process, one decoding thread, and jobs that take turns.

The readable reference: the rows of a job share a batch, and several jobs take turns, one forward pass each, so that a
short one need not wait for the end of a long one. For many concurrent users there is the vLLM engine, which decodes
them together.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import structlog

from operators.model.loading import LoadedModel
from steer_server.config import MAX_RUNNING, OPERATOR_MEMORY
from steer_server.engine.describe import describe_model
from steer_server.engine.fit import fitted
from steer_server.engine.hf.decode import Decoder
from steer_server.engine.hf.failure import Failure, is_lost
from steer_server.engine.hf.memory import DecodeMemory
from steer_server.engine.hf.operator_cache import PreparedOperatorCache
from steer_server.engine.hf.queue import JobQueue, QueuedJob
from steer_server.engine.hf.rope_limit import check_rope
from steer_server.engine.hf.running_job import RunningJob
from steer_server.engine.hf.turns import FairTurns
from steer_server.engine.memory_metrics import MemoryCollector, MemoryUse
from steer_server.engine.prompts import PromptReader, check_sampled_ids
from steer_server.engine.special_stops import special_stops
from steer_server.engine.work import WorkDone
from steer_server.errors import EngineFailedError, ShuttingDownError, SteerServerError, errors_of
from steer_server.parallel import settle_cores
from steer_server.types import Admitted, DecodeJob, ModelInfo, Prompt

log = structlog.get_logger(__name__)

_TELL_SECONDS = 1.5
"""How long closing waits for jobs to end with the text that they have: less than a fifth of the usual grace."""
_CLOSE_SECONDS = 5.0
"""How long closing waits for a running forward pass."""


class HFEngine:
    """Implements :class:`steer_server.engine.base.Engine`. :meth:`submit` needs a running event loop."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_queue: int,
        max_running: int = MAX_RUNNING,
        operator_memory: int = OPERATOR_MEMORY,
        decode_memory: int | None = None,
    ) -> None:
        """Bytes: ``operator_memory`` of operators kept on the device between jobs; ``decode_memory`` of the KV caches
        and logits of the jobs that are decoded at once, None for half of what is free.
        """
        self._model = describe_model(loaded, engine="hf")
        self._loaded = loaded
        operators = self._operators = PreparedOperatorCache(loaded.device, budget=operator_memory)
        memory = DecodeMemory.of(loaded, decode_memory)
        queue = self._queue = JobQueue(max_queue, max_running=max_running, memory=memory)
        self._memory = MemoryCollector(
            {
                "operators": MemoryUse(lambda: operators.num_bytes, operator_memory),
                "decode": MemoryUse(lambda: queue.memory, memory.budget),
            }
        )
        self._turns: FairTurns[RunningJob] = FairTurns(lambda job: (*job.queued.job.caller.client, job))
        self._paused: list[RunningJob] = []
        self._work, self._failure = WorkDone(), Failure()
        # Encoding a prompt is quick compared to decoding a job: the queue of jobs should fill first.
        self._prompts = PromptReader(loaded.tokenizer, self._model, max_waiting=4 * max_queue)
        has_cores = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(has_cores,), name="hf-engine", daemon=True)
        self._thread.start()
        # What is said afterwards of other threads does not hold for this one.
        has_cores.wait()

    @property
    def model(self) -> ModelInfo:
        """The model being served."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer in transformers."""
        return self._loaded.tokenizer

    @property
    def running(self) -> int:
        """Jobs that are being decoded."""
        return self._queue.running

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._queue)

    @property
    def undelivered(self) -> int:
        """See :meth:`steer_server.engine.base.Engine.undelivered`."""
        return self._queue.undelivered

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See :meth:`steer_server.engine.base.Engine.encode`."""
        return await self._prompts.encode(prompt)

    async def encode_text(self, text: str, *, follows: bool) -> tuple[int, ...]:
        """See :meth:`steer_server.engine.base.Engine.encode_text`."""
        return await self._prompts.encode_text(text, follows=follows)

    async def token_texts(self, ids: tuple[int, ...]) -> tuple[str, ...]:
        """Each token decoded on its own."""
        return await self._prompts.texts(ids)

    def fit(self, job: DecodeJob) -> DecodeJob:
        """See :meth:`steer_server.engine.base.Engine.fit`."""
        return fitted(job, self._check_length)

    def check(self, job: DecodeJob) -> None:
        """See :meth:`steer_server.engine.base.Engine.check`."""
        for field, sampling in job.samplings.items():
            with errors_of("sampling", at=field):
                check_sampled_ids(sampling, self._model.vocab_size)
                special_stops(sampling, self._loaded.tokenizer)
        self._check_length(job)

    def jobs_at_once(self, job: DecodeJob) -> int:  # noqa: ARG002 - on another engine its rows count
        """Two: one is decoded, and the next begins when it ends. More would take turns, and end no sooner."""
        return min(2, self._queue.share)

    def submit(self, job: DecodeJob) -> QueuedJob:
        """See :meth:`steer_server.engine.base.Engine.submit`."""
        self.check(job)
        return self._queue.put(job)

    def _check_length(self, job: DecodeJob) -> None:
        check_rope(job, self._loaded.model.config.get_text_config(), self._model.context_length)
        self._queue.check(job)

    @property
    def collectors(self) -> Sequence[MemoryCollector]:
        """Of memory; the rest is covered by the server's own metrics."""
        return (self._memory,)

    @property
    def work(self) -> WorkDone:
        """See :meth:`steer_server.engine.base.Engine.work`."""
        return self._work

    async def failed(self) -> str:
        """Returns, with the reason, when the device or the decoding thread has failed for good; not before."""
        return await self._failure.wait()

    async def close(self) -> None:
        """Ends running jobs as CANCELLED, refuses waiting ones and joins the thread."""
        self._queue.close()
        self._prompts.close()
        await asyncio.to_thread(self._thread.join, _TELL_SECONDS)
        # Those of a forward pass that takes longer still are told while there is time.
        self._queue.abandon(ShuttingDownError())
        await asyncio.to_thread(self._thread.join, _CLOSE_SECONDS - _TELL_SECONDS)

    def _run(self, has_cores: threading.Event) -> None:
        """The decoding thread. Tells when it has settled on how many cores it works."""
        settle_cores()
        has_cores.set()
        try:
            while (job := self._next()) is not None:
                self._take_turn(job)
                # While nothing runs, no KV cache is kept.
                del job
        except BaseException as error:
            # Nobody decodes any more.
            log.exception("decoding ended")
            self._fail(error)

    def _next(self) -> RunningJob | None:
        """The job whose turn it is; None once the queue is closed and nothing runs."""
        while True:
            self._pause_and_resume()
            while (queued := self._queue.take(wait=not len(self._turns))) is not None:
                self._begin(queued)
            self._pause_and_resume()
            if len(self._turns):
                interrupted = (job for job in self._turns if job.queued.interruption() is not None)
                # Its end takes no time, and gives its memory back.
                return next(interrupted, None) or self._turns.next()
            if self._queue.is_closed and not self._paused:
                return None

    def _begin(self, queued: QueuedJob) -> None:
        queued.post(Admitted())
        decoder = Decoder(
            loaded=self._loaded,
            job=queued.job,
            operators=self._operators,
            check_interruption=queued.interruption,
            eos_ids=frozenset(self._model.eos_token_ids),
        )
        self._turns.add(RunningJob(queued, decoder))

    def _pause_and_resume(self) -> None:
        """Jobs whose readers are far behind keep what they have, and take no turns until those have caught up."""
        for job in [job for job in self._turns if job.queued.is_paused]:
            self._turns.remove(job)
            self._paused.append(job)
        for job in [job for job in self._paused if not job.queued.is_paused]:
            self._paused.remove(job)
            # Level with the others: it does not make up for the turns that it did not take.
            self._turns.add(job)

    def _take_turn(self, job: RunningJob) -> None:
        began = time.monotonic()
        error: SteerServerError | None = None
        try:
            self._work.add(*job.take_turn())
        except SteerServerError as caught:
            error = caught
        except Exception as caught:
            # Ends this job only: the thread goes on with the others, if the device does.
            log.exception("job failed")
            error = EngineFailedError(f"{type(caught).__name__}: {caught}")
            if is_lost(caught, self._loaded.device):
                self._fail(caught)
        seconds = time.monotonic() - began
        self._turns.charge(job, seconds)
        job.seconds += seconds
        if error is not None or job.has_ended:
            self._turns.remove(job)
            self._queue.end(job.queued, job.seconds)
            self._operators.trim()
            job.queued.post(error)

    def _fail(self, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {error}"
        self._queue.close(lambda: EngineFailedError(reason))
        self._queue.abandon(EngineFailedError(reason))
        self._failure.set(reason)
