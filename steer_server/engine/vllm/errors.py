"""What a request is told of an error that vLLM raised."""

from __future__ import annotations

import dataclasses

from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from steer_server.errors import EngineFailedError, InvalidRequestError, QueueFullError, SteerServerError
from steer_server.types import SamplingParams

_SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams))


def told_of(error: Exception, *, retry_after: float) -> SteerServerError:
    """No room, a request that vLLM does not take, or, for everything else, an engine that failed.

    Args:
        retry_after: seconds after which there may be room.
    """
    if isinstance(error, EngineDeadError):
        return EngineFailedError(f"the engine died: {error}")
    if isinstance(error, QueueOverflowError):
        return QueueFullError("as many texts run and wait as vLLM admits (max_num_queued_reqs)", retry_after)
    if isinstance(error, MaxQueuedTokensError):
        return QueueFullError("as many prompt tokens wait as vLLM admits (max_num_queued_tokens)", retry_after)
    if isinstance(error, VLLMClientError):
        name = getattr(error, "parameter", None)
        return InvalidRequestError(f"sampling.{name}" if name in _SAMPLING else "request", f"vLLM refuses it: {error}")
    cause = error.__cause__ if isinstance(error, EngineGenerateError) and error.__cause__ else error
    return EngineFailedError(f"{type(cause).__name__}: {cause}")
