"""The serving engine: vLLM with our worker. Continuous batching, tensor parallel, prefix caching.

Each row of a job is one vLLM request. It carries its plan as ids and scalars; a steered one also carries a cache salt
made of its plan, so that it shares keys and values with requests of the very same steering and with no others. The
workers measure what they did; a row ends with the account of it, or with an error.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
import torch
from prometheus_client import REGISTRY
from vllm import AsyncEngineArgs, TokensPrompt
from vllm import SamplingParams as VLLMSamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from operators.core.header import DTYPES
from operators.core.version import __version__
from operators.model.loading import LoadedModel
from steer_server.config import OPERATOR_MEMORY
from steer_server.engine.describe import describe
from steer_server.engine.prompts import PromptReader
from steer_server.engine.vllm.cache_salts import Salts
from steer_server.engine.vllm.errors import told_of
from steer_server.engine.vllm.job import VLLMJob
from steer_server.engine.vllm.limits import check_room, check_supported
from steer_server.engine.vllm.measurements import AccountDesk, agreed
from steer_server.engine.vllm.operator_cache import OperatorShelf, needed
from steer_server.engine.vllm.options import check_engine_args
from steer_server.engine.vllm.processes import session_of_their_own
from steer_server.engine.vllm.sampling import check_sampling
from steer_server.engine.vllm.scoring import ROWS
from steer_server.engine.vllm.self_test import TOKENS, Trial, check_live, check_same_model
from steer_server.engine.vllm.step_steering import Use
from steer_server.engine.vllm.transfer import Sender
from steer_server.errors import EngineFailedError, QueueFullError, ShuttingDownError, StartupError, SteerServerError
from steer_server.types import DecodeJob, ModelInfo, Prompt

log = structlog.get_logger(__name__)

DEVICE: str = current_platform.device_type
"""What the installed vLLM computes on: cpu, cuda (ROCm too) or another."""
WORKER = "steer_server.engine.vllm.worker.SteeringWorker"
EXTRA = "steering"
"""Key of ``SamplingParams.extra_args`` that the worker looks for."""
_CLOSE_SECONDS = 5.0
_POLL_SECONDS = 0.5
_RPC_SECONDS = 600.0
"""How long the workers may take for a call; beyond the longest step, and a model's compilation."""
_SELF_TEST_PROMPT = 6
_APART_EXACT, _APART = 0.02, 1.0
"""Most nats between vLLM and transformers on the average likely token: in float32 on a CPU, and where more is rounded.
bfloat16 moves SmolLM2 by 0.13 and Gemma 3 270M by 0.04; another model is several apart."""
_UNROUNDED_CACHES = ("auto", "float32", "float16", "bfloat16")
_TOLD_APART = ("disable_log_stats", "enable_log_requests", "aggregate_engine_logging")
"""Options that are no part of vLLM's configuration: its constructor takes them."""


class VLLMEngine:
    """Implements :class:`steer_server.engine.base.Engine`; made by :meth:`start`."""

    @classmethod
    async def start(
        cls,
        loaded: LoadedModel,
        source: str,
        *,
        dtype: str,
        max_queue: int,
        engine_args: Mapping[str, Any],
        operator_memory: int = OPERATOR_MEMORY,
    ) -> VLLMEngine:
        """Boots vLLM on the model at ``source`` and tests it.

        Args:
            loaded: the same model in transformers, for its names, its fingerprints and what it makes of the self-test's
                prompt; not kept.
            operator_memory: bytes in each worker that operators may take, beside vLLM's own memory.

        Raises:
            StartupError: an option that is not accepted, an engine that does not come up, or one that does not steer.
        """
        model = describe(loaded, engine="vllm")
        config, logging = _config(source, dtype, engine_args, operator_memory)
        most = _rounding(config)
        expected = None if most is None else await asyncio.to_thread(_logprobs, loaded, _probe(model.vocab_size))
        try:
            with session_of_their_own():
                llm = await asyncio.to_thread(AsyncLLM.from_vllm_config, config, **logging)
        except Exception as error:
            # vLLM raises what its parts raise; its own log has the whole story.
            raise StartupError(f"vLLM did not start: {type(error).__name__}: {error}") from error
        engine = cls(llm, model, loaded.tokenizer, max_queue=max_queue, operator_memory=operator_memory)
        try:
            await engine._self_test(expected, most)
        except BaseException:
            await engine.close()
            raise
        return engine

    def __init__(
        self, llm: AsyncLLM, model: ModelInfo, tokenizer: Any, *, max_queue: int, operator_memory: int
    ) -> None:
        config = llm.vllm_config
        self._llm = llm
        self._tokenizer = tokenizer
        self._model = dataclasses.replace(
            model,
            context_length=int(config.model_config.max_model_len),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            device=current_platform.device_name,
        )
        self.dtype: torch.dtype = config.model_config.dtype
        self._limit = int(config.scheduler_config.max_num_seqs) + max_queue
        self._prompts = PromptReader(tokenizer, self._model, max_waiting=4 * max_queue)
        self.salts = Salts()
        self.desk = AccountDesk(self._take, self.salts)
        self._operator_memory = operator_memory
        self.shelf = OperatorShelf(Sender(self._rpc).send, self._unload, budget=operator_memory)
        self._jobs: set[VLLMJob] = set()
        self._closed = False
        self._silent = ""
        """The call that the workers did not answer."""
        self._seconds_per_row = 1.0

    @property
    def model(self) -> ModelInfo:
        """The model being served."""
        return self._model

    @property
    def running(self) -> int:
        """Rows being decoded."""
        return sum(job.running for job in self._jobs)

    @property
    def waiting(self) -> int:
        """Rows without a token yet."""
        return sum(job.waiting for job in self._jobs)

    @property
    def collectors(self) -> Sequence[Any]:
        """vLLM's own metrics."""
        return (REGISTRY,)

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See :meth:`steer_server.engine.base.Engine.encode`."""
        return await self._prompts.encode(prompt)

    def token_texts(self, ids: tuple[int, ...]) -> tuple[str, ...]:
        """Each token on its own, as text."""
        return self._prompts.texts(ids)

    def submit(self, job: DecodeJob) -> VLLMJob:
        """See :meth:`steer_server.engine.base.Engine.submit`."""
        if self._closed:
            raise ShuttingDownError
        most = int(self._llm.model_config.max_logprobs)
        check_sampling(job.sampling, vocab_size=self._model.vocab_size, max_logprobs=most)
        retry_after = max(1.0, self._seconds_per_row)
        there = self.running + self.waiting
        if there + len(job.rows) > self._limit:
            problem = f"{there} texts run and wait already, and {self._limit} is the most admitted"
            raise QueueFullError(problem, retry_after)
        operators = needed(job, budget=self._operator_memory)
        self.shelf.reserve(operators, retry_after=retry_after)
        running = VLLMJob(self, self._tokenizer, job, operators)
        self._jobs.add(running)
        return running

    def ended(self, job: VLLMJob, seconds: float) -> None:
        """Called by a job when its last row is over."""
        self._jobs.discard(job)
        self.shelf.release(job.operators)
        self._seconds_per_row += 0.2 * (seconds - self._seconds_per_row)

    def failure(self, error: Exception) -> SteerServerError:
        """What is told of an error that vLLM raised."""
        told = told_of(error, retry_after=max(1.0, self._seconds_per_row))
        if isinstance(told, EngineFailedError) and not isinstance(error, EngineDeadError):
            log.error("row failed", exc_info=error)
        return told

    async def held(self) -> Mapping[str, int]:
        """The most that a worker holds of what there is for each request; nothing, when none runs."""
        states = await self._rpc("steering_state")
        return {"requests": max(state[kind] for state in states for kind in ("requests", "keys", "kept", "followed"))}

    async def failed(self) -> str:
        """Returns, with the reason, when the engine has died, or its workers are stuck; not before."""
        while not (self._llm.errored or self._silent):
            await asyncio.sleep(_POLL_SECONDS)
        return self._silent or "the vLLM engine died; its log says why"

    async def close(self) -> None:
        """Ends running rows as CANCELLED and stops vLLM's processes."""
        self._closed = True
        self._prompts.close()
        jobs = list(self._jobs)
        for job in jobs:
            job.stop()
        if jobs and not self._llm.errored:
            await asyncio.wait([asyncio.ensure_future(job.wait()) for job in jobs], timeout=_CLOSE_SECONDS)
        await asyncio.to_thread(self._llm.shutdown)

    def generate(
        self,
        ids: Sequence[int],
        params: Mapping[str, Any],
        uses: Sequence[Use],
        key: str,
        *,
        keep: int | None = None,
        alone: bool = False,
    ) -> Any:
        """vLLM's stream for one row.

        Args:
            key: by which the workers know the row.
            keep: the position from which on the workers keep what a score is made of.
            alone: shares no keys and values with anybody, so that every token of it is computed.
        """
        prompt = TokensPrompt(prompt_token_ids=list(ids))
        told = [list(dataclasses.astuple(use)) for use in uses]
        salt = ""
        if alone or told:
            prompt["cache_salt"] = salt = key if alone else self.salts.of(uses)
        extra = None
        if told or keep is not None:
            extra = {EXTRA: {"key": key, "salt": salt, "uses": told, "keep": keep}}
        sampling = VLLMSamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA, extra_args=extra, **params)
        return self._llm.generate(prompt, sampling, key)

    async def score(self, steered: str, plain: str, ids: Sequence[int]) -> Mapping[str, Sequence[float]]:
        """KL and log-probabilities of a text, from what the workers kept of two rows."""
        found: dict[str, list[float]] = {"kl": [], "logprobs": []}
        for at in range(0, len(ids), ROWS):
            # Between the calls others go on.
            parts = (await self._rpc("steering_score", steered, plain, list(ids[at : at + ROWS]), at))[0]
            for name, part in zip(found, parts, strict=True):
                found[name].extend(part)
        return found

    async def _rpc(self, method: str, *args: Any) -> Sequence[Any]:
        """What every worker answers.

        Raises:
            EngineFailedError: a worker could not do it, or gave no answer; says why.
            EngineDeadError: the engine died, which would never answer.
        """
        call = asyncio.ensure_future(self._llm.collective_rpc("steering_call", args=(method, args)))
        end = time.monotonic() + _RPC_SECONDS
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=_POLL_SECONDS)
                if not call.done() and self._llm.errored:
                    raise EngineDeadError
                if not call.done() and time.monotonic() > end:
                    # One that failed beside the others leaves them waiting for it. What became of the call is not
                    # known, so this engine is not to be trusted with another.
                    self._silent = f"{method}: the workers gave no answer in {_RPC_SECONDS:g} seconds"
                    raise EngineFailedError(self._silent)
        finally:
            # Also where the caller has given up: nobody would look at what comes of it.
            call.cancel()
        answers = call.result()
        for _, problem in answers:
            if problem:
                raise EngineFailedError(f"{method}: {problem}")
        return [answer for answer, _ in answers]

    async def _take(self, keys: list[str]) -> Sequence[Mapping[str, Any] | None]:
        return agreed(await self._rpc("steering_take", keys))

    async def _unload(self, digests: list[str]) -> None:
        await self._rpc("steering_unload", digests)

    async def _self_test(self, expected: Sequence[float] | None, most: float | None) -> None:
        began = time.monotonic()
        prompt = _probe(self._model.vocab_size)
        params = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 5}

        async def run(use: Use | None, key: str) -> Trial:
            ids: list[int] = []
            first: dict[int, float] = {}
            async for output in self.generate(prompt, params, [use] if use else [], key):
                choice = output.outputs[0]
                ids.extend(choice.token_ids)
                first = first or {token: found.logprob for token, found in choice.logprobs[0].items()}
            return Trial(tuple(ids), first)

        try:
            plain = await check_live(run, self._rpc, prompt_tokens=len(prompt), num_layers=self._model.num_layers)
            if expected is not None and most is not None:
                check_same_model(plain.logprobs, expected, most=most)
        except StartupError:
            raise
        except Exception as error:
            # An engine that dies under its first requests, or workers that refuse a call.
            raise StartupError(f"self-test: {type(error).__name__}: {error}") from error
        log.info("self-test passed", layers=self._model.num_layers, seconds=round(time.monotonic() - began, 1))


def _probe(vocab_size: int) -> list[int]:
    # A new prompt every time would be as good; this one is in every vocabulary.
    return [index % vocab_size for index in range(1, 1 + _SELF_TEST_PROMPT)]


def _logprobs(loaded: LoadedModel, prompt: Sequence[int]) -> list[float]:
    """What the model in transformers expects after a prompt: log-probabilities (V,) in nats.

    Raises :class:`StartupError` where it does not run there.
    """
    try:
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([prompt], device=loaded.device), use_cache=False).logits[0, -1]
    except Exception as error:
        raise StartupError(f"self-test: transformers cannot run the model: {type(error).__name__}: {error}") from error
    found: list[float] = logits.float().log_softmax(-1).tolist()
    return found


def _rounding(config: Any) -> float | None:
    """Nats by which two implementations of one model may differ on average; None where vLLM quantises what it holds."""
    model, cache = config.model_config, config.cache_config.cache_dtype
    if model.quantization is not None or cache not in _UNROUNDED_CACHES:
        return None
    # Accelerators may round products of float32. Of long rope factors vLLM has one set for all texts of a server,
    # chosen by max_model_len, and transformers one for each length of a text.
    exact = current_platform.is_cpu() and model.dtype == torch.float32 and cache in ("auto", "float32")
    return _APART_EXACT if exact and "longrope" not in repr(model.hf_text_config) else _APART


def _config(source: str, dtype: str, given: Mapping[str, Any], operator_memory: int) -> tuple[Any, Mapping[str, bool]]:
    """vLLM's configuration, and what its constructor wants to be told besides."""
    check_engine_args(given, [field.name for field in dataclasses.fields(AsyncEngineArgs)])
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    ours: dict[str, Any] = {
        "model": source,
        "dtype": DTYPES[dtype],
        "worker_cls": WORKER,
        # Part of the compile cache's key.
        "additional_config": {**(given.get("additional_config") or {}), "steering": __version__},
    }
    if not current_platform.is_cpu():
        # The op that pushes decides on the host what it does: it runs between the captured pieces.
        ours["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
    try:
        theirs = {key: value for key, value in given.items() if key != "additional_config"}
        args = AsyncEngineArgs(**{**ours, **theirs})
        config = args.create_engine_config()
        check_supported(config)
        if not current_platform.is_cpu() and config.cache_config.kv_cache_memory_bytes is None:
            total = current_platform.get_device_total_memory()
            check_room(total, config.cache_config.gpu_memory_utilization, operator_memory)
    except Exception as error:
        # vLLM raises what its parts raise, of any kind.
        why = str(error) or type(error).__name__
        raise StartupError(f"engine_args: they are refused: {why}") from error
    return config, {name: bool(getattr(args, name)) for name in _TOLD_APART}
