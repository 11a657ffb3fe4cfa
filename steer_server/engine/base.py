"""The interface of an engine: both implement these protocols."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from steer_server.engine.work import WorkDone
from steer_server.types import DecodeJob, EngineEvent, ModelInfo, Prompt


class JobStream(Protocol):
    """The events of one job, in order: Admitted, then the tokens and ends of its rows.

    Iterating raises the job's error, and :class:`SlowReaderError` where nothing was read for a while of much that there
    is to read. The holder of a stream must call ``cancel()`` when done with it; after the last
    event that does nothing.
    """

    def __aiter__(self) -> AsyncIterator[EngineEvent]:
        """Events until every row has finished."""
        ...

    def cancel(self) -> None:
        """Stops the work between two steps and frees its place in the queue."""
        ...


class Engine(Protocol):
    """One loaded model that decodes jobs."""

    @property
    def model(self) -> ModelInfo:
        """The model, known once the engine exists."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer in transformers."""
        ...

    @property
    def running(self) -> int:
        """Jobs being decoded."""
        ...

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        ...

    @property
    def undelivered(self) -> int:
        """Jobs that have been decoded, and whose readers have not taken all of it. They count among those in the
        queue when another one comes.
        """
        ...

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, computed in another thread.

        Raises:
            InvalidRequestError: no tokens, an id outside of the vocabulary, a chat without a template.
            PromptTooLongError: no room for one more token.
            QueueFullError: too many prompts are waiting.
        """
        ...

    async def encode_text(self, text: str, *, follows: bool) -> tuple[int, ...]:
        """Token ids of a text that is to be read, in another thread: behind a prompt where it ``follows`` one.

        Raises:
            InvalidRequestError: no tokens, an id outside of the vocabulary, more than the context has room for.
            QueueFullError: as ``encode`` does.
        """
        ...

    async def token_texts(self, ids: tuple[int, ...]) -> tuple[str, ...]:
        """Each token decoded on its own, in another thread. Raises :class:`QueueFullError` as ``encode`` does."""
        ...

    def fit(self, job: DecodeJob) -> DecodeJob:
        """The job; its texts that may have fewer tokens than they ask for (``fit_max_tokens``) ask for as many as this
        engine has room for.

        Raises :class:`InvalidRequestError` where there is none.
        """
        ...

    def check(self, job: DecodeJob) -> None:
        """Raises :class:`InvalidRequestError` for a job that asks for more than this engine can do."""
        ...

    def jobs_at_once(self, job: DecodeJob) -> int:
        """How many jobs like this one call may have in the engine: at least one, and no more than a client's share."""
        ...

    def submit(self, job: DecodeJob) -> JobStream:
        """Queues a job.

        Raises, at once:
            InvalidRequestError: as :meth:`check` does.
            QueueFullError: there is no place now.
            ShuttingDownError: the engine is closed.
        """
        ...

    @property
    def work(self) -> WorkDone:
        """What has been computed so far."""
        ...

    @property
    def collectors(self) -> Sequence[Any]:
        """Prometheus collectors of the engine's own metrics."""
        ...

    async def failed(self) -> str:
        """Waits until the engine can no longer decode anything, and returns the reason."""
        ...

    async def close(self) -> None:
        """Ends running rows as CANCELLED, refuses waiting jobs, and releases threads and processes."""
        ...
