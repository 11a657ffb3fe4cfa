"""How much memory a build takes, and how many columns may go through a pass within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from operators.core.capacity import in_words
from operators.core.errors import BuildError
from operators.maps.sketch import ROWS_AT_ONCE
from operators.model.loading import decoder_layers

if TYPE_CHECKING:
    from operators.model.loading import LoadedModel

_SKETCH_COPIES = 6
"""Arrays of the size of the sketch that live at once: test vectors, weighed, pulled, and the QR's own."""
_EXACT_COPIES = 3
"""Of an exact operator's numbers: what is built, and two more where it is checked, and again where it is saved."""
_ROOT_COPIES = 5
"""Arrays (d, d) in float64 that live at once where C^{1/2} is made: C, eigenvectors, weighed ones, LAPACK's, itself."""
_ROOT_KEPT = 2
"""Of these, C^{1/2} itself, and what it is as narrow as the vectors that it weighs."""
_LOGITS_COPIES = 6
"""Arrays of the size of the logits, in float32, that live at once where texts are written and compared."""


@dataclass(frozen=True)
class Need:
    """Bytes beside the model: ``fixed`` whatever the pass, ``per_column`` for each column in it."""

    fixed: int
    per_column: int


def sketch_need(loaded: LoadedModel, n: int, layer: int, width: int, texts: int = 1) -> Need:
    """What a sketch of ``width`` columns takes at ``layer`` for a concept of so many texts of at most n tokens."""
    passes, d = _pass_need(loaded, n, layer, texts), loaded.hidden_size
    square, rows = 8 * d * d, min(ROWS_AT_ONCE, int(loaded.model.get_input_embeddings().weight.shape[0]))
    sketched = _SKETCH_COPIES * width * n * d * _itemsize(loaded) + _ROOT_KEPT * square
    return Need(passes.fixed + max(sketched, _ROOT_COPIES * square + 8 * rows * d), passes.per_column)


def exact_need(loaded: LoadedModel, n: int, layer: int, texts: int = 1) -> Need:
    """What the exact operator takes, of n d^2 numbers."""
    passes = _pass_need(loaded, n, layer, texts)
    return Need(passes.fixed + _EXACT_COPIES * n * loaded.hidden_size**2 * _itemsize(loaded), passes.per_column)


def trial_need(loaded: LoadedModel, length: int) -> Need:
    """What the trial of texts of at most ``length`` tokens takes, prompt included: a column is one text."""
    config = loaded.model.config.get_text_config()
    d, heads = loaded.hidden_size, int(config.num_attention_heads)
    # GPT-2 knows neither: all its heads have keys, of d / heads numbers.
    keys = (getattr(config, "num_key_value_heads", None) or heads) * (getattr(config, "head_dim", None) or d // heads)
    # Keys and values of every layer, which are copied as they grow; and what one block works on while a prompt is read:
    # inner layer, attention weights, stream.
    cache = 2 * 2 * loaded.num_layers * length * keys
    block = length * (6 * d + 2 * _widest(loaded) + heads * length)
    logits = _LOGITS_COPIES * int(config.vocab_size) * _itemsize(loaded)
    # The text and its plain follower.
    return Need(fixed=0, per_column=2 * ((cache + block) * loaded.dtype.itemsize + logits))


def columns_within(
    budget: int, need: Need, wanted: int, what: str, less: str = "a lower rank or a shorter concept needs less"
) -> int:
    """How many of ``wanted`` columns go into one pass; ``less`` says what would take less memory.

    Raises:
        BuildError: not even one fits; says what is needed.
    """
    columns = (budget - need.fixed) // need.per_column
    if columns < 1:
        raise BuildError(
            f"{what} needs about {in_words(need.fixed + need.per_column)} of memory beside the model; "
            f"{in_words(max(budget, 0))} may be used (--max-memory; {less})"
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
