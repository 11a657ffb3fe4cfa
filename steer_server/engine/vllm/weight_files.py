"""Which of the weights files in a model's directory vLLM reads: they are to be those that were fingerprinted.

vLLM takes every file of one kind, or those of an index; transformers takes one by its name. Where a directory holds two
checkpoints, the two may differ, and the self-test would not notice a few numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from operators.core.errors import ModelError
from operators.model.checkpoint_files import loaded_weights
from steer_server.errors import StartupError

_LISTED = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "pt", "npcache")
"""Formats of vLLM's own loader; the others list safetensors files as it does."""


def check_same_weights(source: str, load_config: Any) -> None:
    """Raises :class:`StartupError` where vLLM would read other weights files at ``source`` than transformers.

    Args:
        load_config: vLLM's.
    """
    directory = Path(source)
    if not directory.is_dir():
        return
    try:
        fingerprinted = loaded_weights(directory)
    except ModelError as error:
        raise StartupError(str(error)) from error
    read = _read_by_vllm(source, str(load_config.load_format))
    # Names, as both are in this directory.
    different = sorted(str(path.relative_to(directory)) for path in read ^ fingerprinted)
    if different:
        raise StartupError(
            f"model {source}: vLLM would not read the weights that operators are signed for, but others or more "
            f"(load_format {load_config.load_format}): {', '.join(different[:3])}; a directory with one checkpoint is "
            "accepted"
        )


def _read_by_vllm(source: str, load_format: str) -> frozenset[Path]:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = DefaultModelLoader(LoadConfig(load_format=load_format if load_format in _LISTED else "safetensors"))
    try:
        _, files, *_ = loader._prepare_weights(source, None, None, True, None)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise StartupError(f"model {source}: vLLM finds no weights there: {error}") from error
    return frozenset(map(Path, files))
