"""The weights of a checkpoint as they are stored: their digest, and a model that no longer depends on its files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from operators.model.checkpoint_files import CheckpointFiles, stored_dtypes
from operators.model.digest_cache import cached_digest
from operators.model.weights_digest import weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from operators.model.block_weights import BlockWeights

_EXACT_IN = {
    torch.float64: {torch.float64, torch.float32, torch.float16, torch.bfloat16},
    torch.float32: {torch.float32, torch.float16, torch.bfloat16},
    torch.float16: {torch.float16},
    torch.bfloat16: {torch.bfloat16},
}
"""dtype -> the dtypes of which it holds every number."""


def stored_weights_digest(
    files: CheckpointFiles, model: PreTrainedModel, dtype: torch.dtype, load: Callable[[torch.dtype], PreTrainedModel]
) -> str:
    """The digest of the numbers in a checkpoint, from the cache where its files are those of an earlier time.

    Args:
        model: loaded from ``files`` in ``dtype``; its own numbers are read where none of them was rounded.
        load: loads the model in another dtype, to read the numbers as they are stored; its memory is the files'.
    """
    if (kept := cached_digest(files)) is not None:
        return kept
    stored = stored_dtypes(files.weights)
    if stored <= _EXACT_IN[dtype]:
        return weights_digest(model)
    return weights_digest(load(_dtype_of_all(stored)))


def streamed_digest(files: CheckpointFiles, blocks_in: Callable[[torch.dtype], BlockWeights]) -> str:
    """The same, of a model whose blocks are in the files: part by part where it is not in the cache.

    Args:
        blocks_in: the model in another dtype: numbers are read as they are stored.
    """
    kept = cached_digest(files)
    return kept if kept is not None else blocks_in(_dtype_of_all(stored_dtypes(files.weights))).digest()


def _dtype_of_all(stored: frozenset[torch.dtype]) -> torch.dtype:
    if len(stored) == 1:
        # Mapped from the files as it is: no copy is made.
        return next(iter(stored))
    return torch.float64 if torch.float64 in stored else torch.float32


def keep_in_memory(model: PreTrainedModel) -> None:
    """Copies what is mapped from files: a file that is written to would change, or end, the program that maps it."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            # What torch has allocated itself could grow; a map of a file could not.
            if not tensor.untyped_storage().resizable():
                tensor.data = tensor.detach().clone()
