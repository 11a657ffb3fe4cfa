"""The two engines by the names that the configuration gives them, each started in its way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from operators.core.openmp import wait_as_usual
from steer_server.config import ServerConfig
from steer_server.errors import StartupError
from steer_server.parallel import in_own_thread

if TYPE_CHECKING:
    from operators.core.header import DTypeName
    from operators.model.checkpoint_files import CheckpointFiles
    from steer_server.engine.base import Engine

    Started = tuple[Engine, CheckpointFiles | None]


async def _start_hf(config: ServerConfig, dtype: DTypeName, device: str) -> Started:
    from operators.model.loading import load_model
    from steer_server.engine.hf.engine import HFEngine
    from steer_server.engine.hf.self_test import check_steering

    _refuse_hf(config)

    def start() -> Started:
        loaded = load_model(config.model, dtype=dtype, device=device, attention=config.attention)
        check_steering(loaded)
        engine = HFEngine(
            loaded,
            max_queue=config.max_queue,
            max_running=config.max_running,
            operator_memory=config.operator_memory,
            decode_memory=config.decode_memory,
        )
        return engine, loaded.files

    return await in_own_thread(start)


async def _start_vllm(config: ServerConfig, dtype: DTypeName, _device: str) -> Started:
    _refuse_vllm(config)
    from operators.model.loading import load_model
    from steer_server.engine.vllm.engine import VLLMEngine

    # On the CPU, whatever vLLM runs on: only for its fingerprints and one short prompt of the self-test.
    loaded = load_model(config.model, dtype=dtype, device="cpu")
    wait_as_usual()
    assert loaded.files is not None  # noqa: S101 - for the type checker; what was loaded by its name has files
    engine = await VLLMEngine.start(
        loaded,
        # Not its name, which may mean another file or version by now.
        str(loaded.files.directory),
        dtype=dtype,
        max_queue=config.max_queue,
        operator_memory=config.operator_memory if "operator_memory" in config.model_fields_set else None,
        engine_args=config.engine_args,
    )
    return engine, loaded.files


def _refuse_hf(config: ServerConfig) -> None:
    if config.engine_args:
        raise StartupError("engine_args are options of vLLM; they go with --engine vllm")


def _refuse_vllm(config: ServerConfig) -> None:
    if config.attention:
        raise StartupError(
            "attention goes with --engine hf; vLLM's is chosen with --engine-args attention_backend=NAME"
        )
    from steer_server.engine.vllm.limits import check_device

    try:
        import steer_server.engine.vllm.engine  # noqa: F401 - what the engine needs is there
        from steer_server.engine.vllm.engine_config import DEVICE
    except ImportError as error:
        raise StartupError(
            f"engine 'vllm' needs vLLM 0.32 or 0.33, which cannot be imported: {error} (see the README, or use "
            "--engine hf)"
        ) from error
    try:
        check_device(config.device, DEVICE)
    except ValueError as error:
        raise StartupError(str(error)) from error


ENGINES: dict[str, Callable[[ServerConfig, DTypeName, str], Awaitable[Started]]] = {
    "hf": _start_hf,
    "vllm": _start_vllm,
}

REFUSALS: dict[str, Callable[[ServerConfig], None]] = {"hf": _refuse_hf, "vllm": _refuse_vllm}
"""What an engine refuses before anything is loaded, by raising :class:`StartupError`."""
