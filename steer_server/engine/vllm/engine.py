"""The serving engine: vLLM with our worker. Continuous batching, tensor parallel, prefix caching.

Each row of a job is one vLLM request. It carries its plan as digests and scalars; a steered one also carries a cache
salt derived from its plan, so that it shares keys and values only with requests of exactly the same steering. The
workers measure what they did; a row ends with receipts made of these measurements, or with an error.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from prometheus_client import REGISTRY
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from operators.core.artifact import OperatorArtifact
from operators.core.header import DTypeName
from operators.model.loading import LoadedModel
from steer_server.engine.describe import describe_model
from steer_server.engine.fair_queue import FairQueue
from steer_server.engine.fit import fitted
from steer_server.engine.memory_metrics import MemoryCollector, MemoryUse
from steer_server.engine.prompts import PromptReader
from steer_server.engine.reference import EmbeddingRows, EmbedIds
from steer_server.engine.special_stops import special_stops
from steer_server.engine.vllm.boot import boot_vllm
from steer_server.engine.vllm.cache_salts import CacheSalts
from steer_server.engine.vllm.client import VLLMClient
from steer_server.engine.vllm.decode_context import DecodeContext
from steer_server.engine.vllm.engine_config import step_sizes
from steer_server.engine.vllm.errors import translate_error
from steer_server.engine.vllm.job import VLLMJob
from steer_server.engine.vllm.job_memory import JobMemory, job_memory
from steer_server.engine.vllm.measurements import MeasurementCollector
from steer_server.engine.vllm.operator_cache import OperatorCache, required_operators
from steer_server.engine.vllm.operator_room import OperatorRoom
from steer_server.engine.vllm.sampling import check_sampling
from steer_server.engine.vllm.seats import Seats
from steer_server.engine.vllm.transfer import OperatorSender
from steer_server.engine.vllm.worker_protocol import STEERING_MEMORY
from steer_server.engine.work import WorkDone
from steer_server.errors import EngineFailedError, ShuttingDownError, SteerServerError, errors_of
from steer_server.types import DecodeJob, ModelInfo, Prompt

log = structlog.get_logger(__name__)

_CLOSE_SECONDS = 5.0
"""How long running rows get to end as CANCELLED."""
_ONE_CALLS = 4
"""One part in so many of the rows decoded together may be one call's, where it has several prompts."""


class VLLMEngine:
    """Implements :class:`steer_server.engine.base.Engine`; made by :meth:`start`."""

    @classmethod
    async def start(
        cls,
        loaded: LoadedModel,
        source: str,
        *,
        dtype: DTypeName,
        max_queue: int,
        engine_args: Mapping[str, Any],
        operator_memory: int | None = None,
    ) -> VLLMEngine:
        """Boots vLLM on the model at ``source`` and tests it.

        Args:
            loaded: the same model in transformers, for its names, its fingerprints and the self-test. Its embedding
                table is kept: what the workers add is held against what the token ids give.
            operator_memory: bytes in each worker that steering may take of vLLM's share of the memory; None: 4 GiB, but
                at most an eighth of that share.

        Raises:
            StartupError: an option that is not accepted, an engine that does not come up, or one that does not steer.
        """
        model, salts = describe_model(loaded, engine="vllm"), CacheSalts()
        client = await boot_vllm(
            loaded, model, source, dtype=dtype, engine_args=engine_args, operator_memory=operator_memory, salts=salts
        )
        return cls(client, salts, model, loaded.tokenizer, EmbeddingRows(loaded.model), max_queue=max_queue)

    def __init__(
        self,
        client: VLLMClient,
        salts: CacheSalts,
        model: ModelInfo,
        tokenizer: Any,
        embed: EmbedIds,
        *,
        max_queue: int,
    ) -> None:
        config = client.config
        self._client = client
        self._model = dataclasses.replace(
            model,
            context_length=int(config.model_config.max_model_len),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            device=current_platform.device_name,
            attention=client.attention,
        )
        self._max_seqs = int(config.scheduler_config.max_num_seqs)
        self._prompts = PromptReader(tokenizer, self._model, max_waiting=4 * max_queue)
        self._operator_memory = int(config.additional_config[STEERING_MEMORY])
        self._step_sizes = step_sizes(config)
        room = OperatorRoom(self._operator_memory, self._step_sizes.pushes)
        self._operator_cache = OperatorCache(OperatorSender(client.call).send, client.unload, room)
        self._queue: FairQueue[VLLMJob] = FairQueue(max_queue, Seats(self._max_seqs, room))
        self._context = DecodeContext(
            client=client,
            operator_cache=self._operator_cache,
            measurements=MeasurementCollector(client.take_measurements, salts),
            salts=salts,
            model=self._model,
            tokenizer=tokenizer,
            dtype=config.model_config.dtype,
            embed=embed,
            translate_error=self._translate_error,
        )
        self._closed = False

    @property
    def model(self) -> ModelInfo:
        """The model being served."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer in transformers."""
        return self._context.tokenizer

    @property
    def running(self) -> int:
        """Rows being decoded."""
        return sum(job.running for job in self._queue.running)

    @property
    def waiting(self) -> int:
        """Rows without a token yet."""
        return sum(job.waiting for job in (*self._queue.waiting, *self._queue.running))

    @property
    def undelivered(self) -> int:
        """See :meth:`steer_server.engine.base.Engine.undelivered`."""
        return self._queue.undelivered

    @property
    def work(self) -> WorkDone:
        """See :meth:`steer_server.engine.base.Engine.work`."""
        return self._context.work

    @property
    def collectors(self) -> Sequence[Any]:
        """vLLM's own metrics, and what steering takes of its memory in each worker."""
        cache = self._operator_cache
        return (REGISTRY, MemoryCollector({"operators": MemoryUse(lambda: cache.num_bytes, self._operator_memory)}))

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See :meth:`steer_server.engine.base.Engine.encode`."""
        return await self._prompts.encode(prompt)

    async def encode_text(self, text: str, *, follows: bool) -> tuple[int, ...]:
        """See :meth:`steer_server.engine.base.Engine.encode_text`."""
        return await self._prompts.encode_text(text, follows=follows)

    async def token_texts(self, ids: tuple[int, ...]) -> tuple[str, ...]:
        """Each token on its own, as text."""
        return await self._prompts.texts(ids)

    def fit(self, job: DecodeJob) -> DecodeJob:
        """See :meth:`steer_server.engine.base.Engine.fit`."""
        return fitted(job, self._needs)

    def check(self, job: DecodeJob) -> None:
        """See :meth:`steer_server.engine.base.Engine.check`."""
        size, most = self._model.vocab_size, self._client.max_logprobs
        for field, sampling in job.samplings.items():
            with errors_of("sampling", at=field):
                check_sampling(sampling, vocab_size=size, max_logprobs=most, num_eos=len(self._model.eos_token_ids))
                special_stops(sampling, self._context.tokenizer)
        self._needs(job)

    def jobs_at_once(self, job: DecodeJob) -> int:
        """As many as fill a quarter of the rows that vLLM decodes together."""
        return max(1, self._max_seqs // _ONE_CALLS // len(job.rows))

    def submit(self, job: DecodeJob) -> VLLMJob:
        """See :meth:`steer_server.engine.base.Engine.submit`."""
        if self._closed:
            raise ShuttingDownError
        self.check(job)
        memory, operators = self._needs(job)
        queued = VLLMJob(self._context, job, operators, memory, on_end=self._end_job, on_leave=self._queue.leave)
        self._queue.put(queued)
        self._begin_jobs()
        return queued

    def _needs(self, job: DecodeJob) -> tuple[JobMemory, list[OperatorArtifact]]:
        """Memory and operators. Raises :class:`InvalidRequestError` where that is more than there is."""
        budget, sizes = self._operator_memory, self._step_sizes
        memory = job_memory(job, sizes, budget=budget, context_length=self._model.context_length)
        return memory, required_operators(job, budget=budget, pushes=sizes.pushes(memory.layers), held=memory.held)

    async def num_held_requests(self) -> int:
        """The most requests for which a worker holds anything; 0 once all have ended and been measured."""
        return await self._client.num_held_requests()

    async def failed(self) -> str:
        """Returns, with the reason, when the engine has died or its workers are stuck; not before."""
        return await self._client.failed()

    async def close(self) -> None:
        """Ends running rows as CANCELLED and stops vLLM's processes."""
        self._closed = True
        self._prompts.close()
        jobs = self._queue.running
        for job in (*self._queue.waiting, *jobs):
            job.stop()
        if jobs and not self._client.died:
            await asyncio.wait([asyncio.ensure_future(job.wait()) for job in jobs], timeout=_CLOSE_SECONDS)
        await self._client.shutdown()

    def _begin_jobs(self) -> None:
        while not self._closed and (job := self._queue.begin_next()) is not None:
            job.begin()

    def _end_job(self, job: VLLMJob, seconds: float) -> None:
        """Called by a job, once, when its last row has ended."""
        # They run at once: so many end in that time.
        self._queue.end(job, seconds / len(self._queue.running))
        self._begin_jobs()

    def _translate_error(self, error: Exception) -> SteerServerError:
        translated = translate_error(error, retry_after=max(1.0, self._queue.hint()))
        if isinstance(translated, EngineFailedError) and not isinstance(error, EngineDeadError):
            log.error("row failed", exc_info=error)
        return translated
