"""The embedded engine: a transformers model in this process, one decoding thread, one job at a time.

The readable reference. A job's rows share a batch; jobs wait for each other. Serving many users at once is what the
vLLM engine is for.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import structlog
import torch

from operators.errors import OperatorError
from operators.models import LoadedModel, decoder_layers
from steer_server.engine.decode import Decoder
from steer_server.engine.queue import JobQueue, QueuedJob
from steer_server.engine.steering import PreparedOperators
from steer_server.errors import (
    EngineFailedError,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    ShuttingDownError,
    StartupError,
    SteerServerError,
)
from steer_server.types import Admitted, DecodeJob, ModelInfo, Prompt

log = structlog.get_logger(__name__)

_PREPARED_BYTES = 4 << 30
"""Operators kept on the device between jobs."""
_CLOSE_SECONDS = 5.0
"""How long closing waits for a forward pass that is under way."""


class HFEngine:
    """Implements :class:`steer_server.engine.base.Engine`. Needs a running event loop to submit."""

    def __init__(self, loaded: LoadedModel, *, max_queue: int) -> None:
        self._loaded = loaded
        self._tokenizer = loaded.tokenizer
        self._eos_ids = _eos_ids(loaded)
        self._prepared = PreparedOperators(loaded.device, budget=_PREPARED_BYTES)
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._encoding = 0
        # Reading a prompt is quick beside decoding it; the queue of jobs is to be the one that fills.
        self._max_encoding = 4 * max_queue
        self._closed = False
        self._queue = JobQueue(max_queue)
        self._model = _describe(loaded, self._eos_ids)
        self._longest_token = max(len(token.encode()) for token in self._tokenizer.get_vocab())
        self._thread = threading.Thread(target=self._work, name="hf-engine", daemon=True)
        self._thread.start()

    @property
    def model(self) -> ModelInfo:
        """The model being served."""
        return self._model

    @property
    def running(self) -> int:
        """1 while a job is being decoded."""
        return self._queue.running

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._queue)

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See :meth:`steer_server.engine.base.Engine.encode`.

        In a thread of its own, and not without bound: a long prompt takes seconds, and streams go on.
        """
        if self._closed:
            raise ShuttingDownError
        if self._encoding >= self._max_encoding:
            raise QueueFullError(self._max_encoding, retry_after=1.0)
        self._encoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, self._encode, prompt)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):
                # Not the caller gave up: closing took the prompt out of the line.
                raise ShuttingDownError from None
            raise
        finally:
            self._encoding -= 1

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        ids = self._ids(prompt)
        if not ids:
            raise InvalidRequestError("prompt", "has no tokens; at least one is needed")
        if len(ids) >= self._model.context_length:
            raise PromptTooLongError(len(ids), self._model.context_length)
        # Of text too: a tokenizer may know more tokens than the model has embeddings for.
        _check_ids("prompt.token_ids", ids, self._model.vocab_size)
        return ids

    def _tokenise(self, text: str, *, special_tokens: bool) -> tuple[int, ...]:
        fewest = len(text.encode()) // self._longest_token
        if fewest > self._model.context_length:
            # Known without tokenising, which for megabytes takes long.
            raise PromptTooLongError(fewest, self._model.context_length)
        return tuple(self._tokenizer(text, add_special_tokens=special_tokens)["input_ids"])

    def token_texts(self, ids: tuple[int, ...]) -> tuple[str, ...]:
        """Each token on its own, as text."""
        return tuple(str(self._tokenizer.decode([token])) for token in ids)

    def submit(self, job: DecodeJob) -> QueuedJob:
        """See :meth:`steer_server.engine.base.Engine.submit`."""
        _check_ids("sampling.stop_token_ids", job.sampling.stop_token_ids, self._model.vocab_size)
        return self._queue.put(job)

    async def close(self) -> None:
        """Ends the running job as CANCELLED, refuses waiting ones, joins the thread."""
        self._closed = True
        self._queue.close()
        self._encoder.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.join, _CLOSE_SECONDS)

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.text is not None:
            return self._tokenise(prompt.text, special_tokens=True)
        if not self._model.has_chat_template:
            raise InvalidRequestError("prompt.chat", f"{self._model.model} has no chat template; send text")
        messages = [{"role": turn.role, "content": turn.content} for turn in prompt.chat or ()]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            # Templates are programs of their authors, and raise what they like.
            raise InvalidRequestError("prompt.chat", f"the chat template refuses it: {error}") from error
        return self._tokenise(text, special_tokens=False)

    def _work(self) -> None:
        while (queued := self._queue.take()) is not None:
            started = time.monotonic()
            try:
                self._decode(queued)
                queued.post(None)
            except SteerServerError as error:
                queued.post(error)
            except Exception as error:
                # One job's failure is its own: the thread goes on to serve the others.
                log.exception("job failed")
                queued.post(EngineFailedError(f"{type(error).__name__}: {error}"))
            self._queue.finished_in(time.monotonic() - started)

    def _decode(self, queued: QueuedJob) -> None:
        queued.post(Admitted())
        decoder = Decoder(
            loaded=self._loaded,
            job=queued.job,
            prepared=self._prepared,
            interrupted=queued.interrupted,
            eos_ids=frozenset(self._eos_ids),
        )
        try:
            for event in decoder.run():
                queued.post(event)
        finally:
            self._prepared.trim()


def _check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(f"{field}[{index}]", f"is {token}; 0 to {vocab_size - 1} are accepted")


def _eos_ids(loaded: LoadedModel) -> tuple[int, ...]:
    found = loaded.model.generation_config.eos_token_id
    if found is None:
        found = loaded.tokenizer.eos_token_id
    return tuple(found) if isinstance(found, list | tuple) else () if found is None else (int(found),)


def _describe(loaded: LoadedModel, eos_ids: tuple[int, ...]) -> ModelInfo:
    """Raises :class:`StartupError` for a model that this engine cannot decode or steer."""
    if getattr(loaded.tokenizer, "backend_tokenizer", None) is None:
        raise StartupError(
            f"{loaded.name}: its tokenizer {type(loaded.tokenizer).__name__} has no fast form, which streaming needs"
        )
    try:
        layers = len(decoder_layers(loaded.model))
        vocab_size = int(loaded.model.config.get_text_config().vocab_size)
        context_length = loaded.context_length
    except (OperatorError, AttributeError) as error:
        raise StartupError(f"{loaded.name} ({type(loaded.model).__name__}) cannot be served: {error}") from error
    return ModelInfo(
        model=loaded.name,
        architecture=type(loaded.model).__name__,
        fingerprint=loaded.fingerprint,
        tokenizer_fingerprint=loaded.tokenizer_fingerprint,
        num_layers=layers,
        hidden_size=loaded.hidden_size,
        vocab_size=vocab_size,
        context_length=context_length,
        eos_token_ids=eos_ids,
        has_chat_template=bool(getattr(loaded.tokenizer, "chat_template", None)),
        engine="hf",
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device if loaded.device.type == "cpu" else torch.cuda.get_device_name(loaded.device)),
    )
