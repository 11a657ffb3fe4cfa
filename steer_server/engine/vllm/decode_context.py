"""What the rows of all jobs on vLLM use, and how the receipts of one are proved."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from steer_server.engine.proof import Proof
from steer_server.engine.reference import EmbedIds
from steer_server.engine.vllm.cache_salts import CacheSalts
from steer_server.engine.vllm.measurements import MeasurementCollector, measured_receipts, prove
from steer_server.engine.vllm.operator_cache import OperatorCache
from steer_server.engine.vllm.worker_protocol import operator_settings
from steer_server.engine.work import WorkDone
from steer_server.errors import SteeringNotAppliedError, SteerServerError
from steer_server.types import ModelInfo, Receipt, SteeringPlan

if TYPE_CHECKING:
    # Not at run time: it imports vLLM, and jobs are tested without.
    from steer_server.engine.vllm.client import VLLMClient


@dataclass(frozen=True, eq=False)
class DecodeContext:
    """What the rows of all jobs use. Filled by the engine, once."""

    client: VLLMClient
    operator_cache: OperatorCache
    measurements: MeasurementCollector
    salts: CacheSalts
    model: ModelInfo
    tokenizer: Any
    dtype: torch.dtype
    """Of the hidden states."""
    embed: EmbedIds
    """The model's embeddings, in this process: what a worker pushed is judged without the worker."""
    translate_error: Callable[[Exception], SteerServerError]
    """What a request is told of an exception that vLLM raised."""
    work: WorkDone = field(default_factory=WorkDone)


READING: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True}
"""Sampling of a request that only reads: vLLM chooses at least one token."""


async def prove_receipts(
    context: DecodeContext,
    plan: SteeringPlan,
    proof: Proof,
    measurement: Mapping[str, Any] | None,
    *,
    ids: Sequence[int],
    prompt_tokens: int,
) -> tuple[Receipt, ...]:
    """The receipts of a row whose prompt and text are ``ids``. Raises :class:`SteeringNotAppliedError`."""
    try:
        # In a thread: the reference of a wide exact operator takes a while.
        await asyncio.to_thread(prove, proof, measurement, ids=ids, dtype=context.dtype)
        return measured_receipts(plan, measurement, proof, prompt_tokens=prompt_tokens, fed=len(ids) - 1)
    except SteeringNotAppliedError:
        # Also where the workers noticed no failure: what is cached under the salt is not of this steering.
        context.salts.renew(operator_settings(plan, prompt_tokens))
        raise
