"""vLLM's configuration: the user's options and those that steering needs, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from vllm import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from operators.core.capacity import format_bytes
from operators.core.dtypes import DTYPES
from operators.core.header import DTypeName
from operators.core.version import __version__
from steer_server.engine.vllm.free_memory import free_share
from steer_server.engine.vllm.job_memory import StepSizes
from steer_server.engine.vllm.limits import check_supported
from steer_server.engine.vllm.memory import default_steering_memory
from steer_server.engine.vllm.options import check_engine_args
from steer_server.engine.vllm.worker_protocol import SHARE_OF_FREE, STEERING_MEMORY
from steer_server.errors import StartupError

DEVICE: str = current_platform.device_type
"""What the installed vLLM computes on: cpu, cuda (ROCm too) or another."""
USAGE = UsageContext.OPENAI_API_SERVER
"""As what vLLM is used: it chooses the sizes of batches by it, and those of a server are not those of a library."""
WORKER = "steer_server.engine.vllm.worker.worker.SteeringWorker"
_EXACT_TOLERANCE, _ROUNDED_TOLERANCE = 0.005, 0.15
"""Nats, see :func:`logprob_tolerance`: for float32 on a CPU, and where anything is rounded to fewer bits. Measured:
bfloat16 changes SmolLM2 and Gemma 3 270M by 0.04; rotary factors of another scale change SmolLM2 by 0.28 (1.5 times)
and 0.58 (twice), and one MLP of 30 that is left out by 0.64."""
_UNQUANTISED_CACHES = ("auto", "float32", "float16", "bfloat16")
_CONSTRUCTOR_OPTIONS = ("disable_log_stats", "enable_log_requests", "aggregate_engine_logging")
"""Options that vLLM's constructor takes itself: they are no part of its configuration."""


def make_engine_config(
    source: str, dtype: DTypeName, engine_args: Mapping[str, Any], operator_memory: int | None
) -> tuple[Any, Mapping[str, bool]]:
    """vLLM's configuration for the model at ``source``, and the arguments that its constructor takes beside it.

    Args:
        engine_args: the user's options of vLLM.
        operator_memory: bytes on each device that steering may take; None for a part of what vLLM may.

    Raises:
        StartupError: an option is not accepted, or steering does not support the configuration.
    """
    check_engine_args(engine_args, known_engine_args())
    set_process_defaults(on_cpu=current_platform.is_cpu())
    required: dict[str, Any] = {
        "model": source,
        "dtype": DTYPES[dtype],
        "worker_cls": WORKER,
        # vLLM hashes this into the key of its compile cache: another version of the worker compiles anew.
        "additional_config": {**(engine_args.get("additional_config") or {}), "steering": __version__},
    }
    # Nothing but text is asked for: of a model that reads images too, its decoder is enough.
    defaults: dict[str, Any] = {"language_model_only": True}
    if not current_platform.is_cpu():
        # The op that pushes decides on the host what it does, so it must run between captured graphs, never inside one.
        defaults["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
    try:
        args = AsyncEngineArgs(**{**defaults, **engine_args, **required})
        # The sizes of batches are chosen as for vLLM's own server.
        config = args.create_engine_config(usage_context=USAGE)
        check_supported(config)
        _divide_memory(config, "gpu_memory_utilization" in engine_args, operator_memory)
    except Exception as error:
        # vLLM's parts raise exceptions of any class here.
        why = str(error) or type(error).__name__
        raise StartupError(f"engine_args: they are refused: {why}") from error
    return config, {name: bool(getattr(args, name)) for name in _CONSTRUCTOR_OPTIONS}


def known_engine_args() -> list[str]:
    """The names of all options of the vLLM that is installed."""
    return [field.name for field in dataclasses.fields(AsyncEngineArgs)]


def _divide_memory(config: Any, has_share: bool, operator_memory: int | None) -> None:
    """Notes for the workers what steering may take and, on a CPU, whether vLLM's share is to be what is free.

    vLLM's default share is one of all memory, so that it would not start where much of that is in use.
    """
    cache, share_of_free_memory = config.cache_config, False
    total, share = current_platform.get_device_total_memory(), cache.gpu_memory_utilization
    if current_platform.is_cpu() and cache.kv_cache_memory_bytes is None and not has_share:
        share_of_free_memory = True
        share = min(share, free_share(config))
    least = step_sizes(config).pushes(1)
    if operator_memory is None:
        operator_memory = max(default_steering_memory(round(total * share)), 2 * least)
    if operator_memory < least:
        raise ValueError(
            f"--operator-memory is {format_bytes(operator_memory)}, and the pushes of a step of "
            f"{config.scheduler_config.max_num_batched_tokens} tokens (max_num_batched_tokens) at one layer take "
            f"{format_bytes(least)}"
        )
    config.additional_config |= {STEERING_MEMORY: operator_memory, SHARE_OF_FREE: share_of_free_memory}


def step_sizes(config: Any) -> StepSizes:
    """What the memory for pushes depends on, from vLLM's configuration."""
    model = config.model_config
    return StepSizes(
        tokens=int(config.scheduler_config.max_num_batched_tokens),
        width=int(model.get_hidden_size()),
        itemsize=int(model.dtype.itemsize),
    )


def set_process_defaults(*, on_cpu: bool) -> None:
    """What vLLM reads from the environment, where the user has not said otherwise there."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Of what a start that failed leaves behind: it is cleaned up, and the reason is to be the last line.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    if not on_cpu:
        # vLLM forks, and spawns where it sees that CUDA is in use. It does not see that the driver was only started, as
        # torch.cuda.is_available() does; a forked process can no longer use the device then.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def logprob_tolerance(config: Any) -> float | None:
    """Nats by which vLLM and transformers may differ, on average over the tokens of a text, and be the same model.

    None where vLLM quantises weights or cache: then no difference proves that the model is another one.
    """
    model, cache_dtype = config.model_config, config.cache_config.cache_dtype
    if model.quantization is not None or cache_dtype not in _UNQUANTISED_CACHES:
        return None
    # Accelerators may round float32 products.
    exact = current_platform.is_cpu() and model.dtype == torch.float32 and cache_dtype in ("auto", "float32")
    return _EXACT_TOLERANCE if exact else _ROUNDED_TOLERANCE
