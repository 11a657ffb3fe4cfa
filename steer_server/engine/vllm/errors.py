"""Translates exceptions that vLLM raised into the errors that a request can meet."""

from __future__ import annotations

import dataclasses

from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from steer_server.errors import EngineFailedError, InvalidRequestError, QueueFullError, SteerServerError
from steer_server.types import SamplingParams

_SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))


def translate_error(error: Exception, *, retry_after: float) -> SteerServerError:
    """A full queue, a request that vLLM refuses or, for everything else, an engine that failed.

    Args:
        retry_after: seconds after which a place is likely to be free.
    """
    if isinstance(error, EngineDeadError):
        return EngineFailedError(f"the engine died: {error}")
    if isinstance(error, QueueOverflowError):
        return QueueFullError("as many texts run and wait as vLLM admits (max_num_queued_reqs)", retry_after)
    if isinstance(error, MaxQueuedTokensError):
        return QueueFullError("as many prompt tokens wait as vLLM admits (max_num_queued_tokens)", retry_after)
    if isinstance(error, VLLMClientError):
        name = getattr(error, "parameter", None)
        return InvalidRequestError(
            f"sampling.{name}" if name in _SAMPLING_FIELDS else "request", f"vLLM refuses it: {error}"
        )
    cause = error.__cause__ if isinstance(error, EngineGenerateError) and error.__cause__ else error
    return EngineFailedError(f"{type(cause).__name__}: {cause}")
