"""The embedded engine: a transformers model in this process, one decoding thread, one job at a time.

The readable reference: the rows of a job share a batch, and jobs run one after the other. For many concurrent users
there is the vLLM engine.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import structlog

from operators.model.loading import LoadedModel
from steer_server.config import OPERATOR_MEMORY
from steer_server.engine.describe import describe_model
from steer_server.engine.hf.decode import Decoder
from steer_server.engine.hf.operator_cache import PreparedOperatorCache
from steer_server.engine.hf.queue import JobQueue, QueuedJob
from steer_server.engine.hf.rope_limit import check_rope
from steer_server.engine.prompts import PromptReader, check_ids
from steer_server.engine.special_stops import special_stops
from steer_server.errors import EngineFailedError, SteerServerError
from steer_server.types import Admitted, DecodeJob, ModelInfo, Prompt

log = structlog.get_logger(__name__)

_CLOSE_SECONDS = 5.0
"""How long closing waits for a running forward pass."""


class HFEngine:
    """Implements :class:`steer_server.engine.base.Engine`. :meth:`submit` needs a running event loop."""

    def __init__(self, loaded: LoadedModel, *, max_queue: int, operator_memory: int = OPERATOR_MEMORY) -> None:
        """``operator_memory``: bytes of operators kept on the device between jobs."""
        self._loaded = loaded
        self._operators = PreparedOperatorCache(loaded.device, budget=operator_memory)
        self._queue = JobQueue(max_queue)
        self._model = describe_model(loaded, engine="hf")
        # Encoding a prompt is quick compared to decoding a job: the queue of jobs should fill first.
        self._prompts = PromptReader(loaded.tokenizer, self._model, max_waiting=4 * max_queue)
        self._thread = threading.Thread(target=self._work, name="hf-engine", daemon=True)
        self._thread.start()

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
        """1 while a job is being decoded."""
        return self._queue.running

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._queue)

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See :meth:`steer_server.engine.base.Engine.encode`."""
        return await self._prompts.encode(prompt)

    def token_texts(self, ids: tuple[int, ...]) -> tuple[str, ...]:
        """Each token decoded on its own."""
        return self._prompts.texts(ids)

    def submit(self, job: DecodeJob) -> QueuedJob:
        """See :meth:`steer_server.engine.base.Engine.submit`."""
        check_ids("sampling.stop_token_ids", job.sampling.stop_token_ids, self._model.vocab_size)
        special_stops(job.sampling.stop_strings, self._loaded.tokenizer)
        check_rope(job, self._loaded.model.config.get_text_config(), self._model.context_length)
        return self._queue.put(job)

    @property
    def collectors(self) -> tuple[()]:
        """None: the server's own metrics cover this engine."""
        return ()

    async def failed(self) -> str:
        """Never returns: a failure ends one job, and never the engine."""
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    async def close(self) -> None:
        """Ends the running job as CANCELLED, refuses waiting ones and joins the thread."""
        self._queue.close()
        self._prompts.close()
        await asyncio.to_thread(self._thread.join, _CLOSE_SECONDS)

    def _work(self) -> None:
        while (queued := self._queue.take()) is not None:
            started = time.monotonic()
            try:
                self._decode(queued)
                queued.post(None)
            except SteerServerError as error:
                queued.post(error)
            except Exception as error:
                # Ends this job only: the thread goes on with the others.
                log.exception("job failed")
                queued.post(EngineFailedError(f"{type(error).__name__}: {error}"))
            self._queue.record_duration(time.monotonic() - started)

    def _decode(self, queued: QueuedJob) -> None:
        queued.post(Admitted())
        decoder = Decoder(
            loaded=self._loaded,
            job=queued.job,
            operators=self._operators,
            check_interruption=queued.interruption,
            eos_ids=frozenset(self._model.eos_token_ids),
        )
        try:
            for event in decoder.run():
                queued.post(event)
        finally:
            self._operators.trim()
