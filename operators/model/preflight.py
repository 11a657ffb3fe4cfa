"""What can be said of a model by its configuration, before gigabytes of weights are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from operators.core.capacity import format_bytes, free_memory
from operators.core.dtypes import DTYPES
from operators.core.errors import ModelError
from operators.core.header import AttentionName, DTypeName
from operators.model.attention import choose_attention
from operators.model.decoders import TextDecoder, read_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Examined:
    """What :func:`examine` found. ``model`` has no weights; ``attention`` is what it is to be loaded with."""

    decoder: TextDecoder
    model: PreTrainedModel
    attention: AttentionName
    need: int
    """Bytes of its weights in the dtype asked for."""
    have: int
    """Bytes that they may take."""


ModelCheck = Callable[["PreTrainedModel"], object]
"""Raises an error where it does not accept a model; the model has no weights, and only its modules can be looked at."""


def examine(
    name: str,
    source: str,
    revision: str,
    *,
    dtype: DTypeName,
    device: torch.device,
    attention: AttentionName | None,
    checks: Iterable[ModelCheck],
    device_memory: int | None = None,
) -> Examined:
    """The model at ``source`` without its weights, after all checks that need none.

    Args:
        device_memory: bound of the bytes on ``device``; None means most of what is free.

    Raises:
        ModelError: it has no such attention.
        Exception: what ``checks`` raise, and transformers where it does not know the architecture.
    """
    from transformers import AutoModelForCausalLM

    decoder = read_decoder(name, source, revision)
    with torch.device("meta"):
        # Every model has eager attention.
        empty = AutoModelForCausalLM.from_config(
            decoder.config, attn_implementation="eager", trust_remote_code=False
        ).eval()
    for check in checks:
        try:
            check(empty)
        except ModelError as error:
            raise type(error)(f"model {name!r}: {error}") from error
    chosen = choose_attention(empty, attention)
    need = sum(parameter.numel() for parameter in empty.parameters()) * DTYPES[dtype].itemsize
    have = free_memory(device)
    return Examined(decoder, empty, chosen, need, have if device_memory is None else min(have, device_memory))


def check_fits(name: str, examined: Examined, dtype: DTypeName, device: str) -> None:
    """Raises :class:`ModelError` where its weights do not fit into the memory."""
    if examined.need > examined.have:
        raise ModelError(
            f"model {name!r} takes {format_bytes(examined.need)} of memory in {dtype}; {format_bytes(examined.have)} "
            f"may be used on {device}"
        )
