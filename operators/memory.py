"""How much memory a build takes, and how many columns may go through a pass within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from operators.capacity import in_words
from operators.errors import BuildError
from operators.models import decoder_layers

if TYPE_CHECKING:
    from operators.models import LoadedModel

_SKETCH_COPIES = 6
"""Arrays of the size of the sketch that live at once: test vectors, weighed, pulled, and the QR's own."""


@dataclass(frozen=True)
class Need:
    """Bytes beside the model: ``fixed`` whatever the pass, ``per_column`` for each column in it."""

    fixed: int
    per_column: int


def sketch_need(loaded: LoadedModel, n: int, layer: int, width: int, texts: int = 1) -> Need:
    """What a sketch of ``width`` columns takes at ``layer`` for a concept of so many texts of at most n tokens."""
    passes = _pass_need(loaded, n, layer, texts)
    return Need(passes.fixed + _SKETCH_COPIES * width * n * loaded.hidden_size * _itemsize(loaded), passes.per_column)


def exact_need(loaded: LoadedModel, n: int, layer: int, texts: int = 1) -> Need:
    """What the exact operator takes: its n d^2 numbers twice, once while it is written."""
    passes = _pass_need(loaded, n, layer, texts)
    return Need(passes.fixed + 2 * n * loaded.hidden_size**2 * _itemsize(loaded), passes.per_column)


def columns_within(budget: int, need: Need, wanted: int, what: str) -> int:
    """How many of ``wanted`` columns go into one pass.

    Raises:
        BuildError: not even one fits; says what is needed.
    """
    columns = (budget - need.fixed) // need.per_column
    if columns < 1:
        raise BuildError(
            f"{what} needs about {in_words(need.fixed + need.per_column)} of memory beside the model; "
            f"{in_words(budget)} may be used (--max-memory; a lower rank or a shorter concept needs less)"
        )
    return int(min(columns, wanted))


def _pass_need(loaded: LoadedModel, n: int, layer: int, texts: int) -> Need:
    config = loaded.model.config.get_text_config()
    d, wide = loaded.hidden_size, _widest(loaded)
    itemsize = _itemsize(loaded)
    # The tape: attention weights, gates, two norms' scales.
    tape = texts * layer * n * (int(config.num_attention_heads) * n + wide + 2) * itemsize
    # Alive at once in a block: the stream, what the norms make of it, values and what attention makes of them, and
    # the inner layer before and after its gate; as much again for gradients. Every text keeps the input of its graph.
    return Need(fixed=tape, per_column=n * ((5 + texts) * d + 4 * wide) * itemsize)


def _widest(loaded: LoadedModel) -> int:
    weights = (parameter for parameter in decoder_layers(loaded.model)[0].parameters() if parameter.dim() == 2)
    return max(max(weight.shape) for weight in weights)


def _itemsize(loaded: LoadedModel) -> int:
    return torch.promote_types(loaded.dtype, torch.float32).itemsize
