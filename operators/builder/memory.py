"""How much memory a computation takes beside the model, and how many rows a pass may have within a budget.

A row is one entry of a forward pass's batch: a tangent or cotangent of a build, a text of a trial. The estimates count
the largest arrays that are alive at once, and leave room for what no array shows: what libraries load when they are
first used, and what the allocator cannot hand on. The model's weights are not among them, nor the program itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from operators.core.capacity import format_bytes
from operators.core.errors import BuildError
from operators.maps.sketch import TABLE_ROWS_AT_ONCE
from operators.maps.sweeps import PLAIN_POSITIONS
from operators.model.loading import decoder_layers

if TYPE_CHECKING:
    from operators.model.loading import LoadedModel

_SKETCH_COPIES = 5
"""Arrays (l, n, d) that are alive at once: products, and weighted ones, then in float64, where the basis is ordered."""
_EXACT_COPIES = 3
"""Arrays of the exact operator's size: the operator, and two more where it is checked, and again where it is saved."""
_ROOT_COPIES = 5
"""Arrays (d, d) in float64 while C^{1/2} is made: C, its eigenvectors, weighted ones, LAPACK's workspace, C^{1/2}."""
_ROOT_KEPT = 2
"""Of these, what stays: C^{1/2}, and its copy in the dtype of the vectors that it weights."""
_RECORDED_COPIES = 5
"""Arrays of a block's attention weights while they are recorded: scores, softmax, the identity for each head, and what
comes of it, twice."""
_STORED = 4
"""Bytes of a number in the files: at most this, but of a model that is stored in float64."""
_ALLOCATOR = 1.1
"""What is resident over what is in use, of the large arrays."""
_LIBRARIES = 48 << 20
"""Bytes that the first build of a process takes for good, whatever its size: modules, kernels, their buffers."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes beside the model: ``fixed`` whatever the batch, ``per_row`` for each row of a pass."""

    fixed: int
    per_row: int


def estimate_sketch(loaded: LoadedModel, n: int, layer: int, width: int, texts: int = 1) -> MemoryEstimate:
    """A sketch at ``layer``, of ``texts`` texts of at most n tokens; ``width`` is the vectors of its widest product."""
    passes, d = _estimate_passes(loaded, n, layer, texts), loaded.hidden_size
    square, rows = 8 * d * d, min(TABLE_ROWS_AT_ONCE, int(loaded.model.get_input_embeddings().weight.shape[0]))
    # C^{1/2} is made before the sketch begins, so that the larger of the two counts.
    sketch = _SKETCH_COPIES * width * n * d * _itemsize(loaded) + _ROOT_KEPT * square
    root = _ROOT_COPIES * square + 8 * rows * d
    sketch += _rounded_bytes(loaded, loaded.dtype)
    return _with_allowance(passes.fixed + max(sketch, root, _recording(loaded, n)), passes.per_row)


def range_dtype(loaded: LoadedModel) -> torch.dtype | None:
    """In what a sketch multiplies with weights to find its range: bfloat16 or, by None, as elsewhere.

    bfloat16 where it was measured to be faster, which is on CPUs that have instructions for it (AVX-512 BF16). Of
    machine and model alone, so that these build the same twice, streamed or not.
    """
    if loaded.device.type != "cpu" or _itemsize(loaded) != torch.float32.itemsize:
        return None
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


def _rounded_bytes(loaded: LoadedModel, dtype: torch.dtype) -> int:
    """The largest weight as a sketch rounds it, of weights that are ``dtype`` when it does."""
    if range_dtype(loaded) in (None, dtype):
        return 0
    weights = [weight for block in decoder_layers(loaded.model) for weight in block.parameters()]
    # Of a mixture, one expert at a time.
    largest = max(weight.numel() // (len(weight) if weight.dim() == 3 else 1) for weight in weights)
    return torch.bfloat16.itemsize * largest


def estimate_exact(loaded: LoadedModel, n: int, layer: int, texts: int = 1) -> MemoryEstimate:
    """An exact operator, of n d^2 numbers, at ``layer``, of ``texts`` texts of at most n tokens."""
    passes = _estimate_passes(loaded, n, layer, texts)
    operator = n * loaded.hidden_size**2 * _itemsize(loaded)
    return _with_allowance(passes.fixed + max(_EXACT_COPIES * operator, _recording(loaded, n)), passes.per_row)


def estimate_streamed(
    loaded: LoadedModel,
    n: int,
    layer: int,
    width: int,
    texts: int = 1,
    *,
    sketched: bool = True,
    on_accelerator: bool = False,
) -> MemoryEstimate:
    """All that a build with streamed blocks takes beside the program: what stays of the model, and a block of it.

    ``on_accelerator``: only what is in the memory of one; :func:`host_bytes` is what is not.
    """
    passes, d, itemsize = _estimate_passes(loaded, n, 1, texts), loaded.hidden_size, _itemsize(loaded)
    table = loaded.model.get_input_embeddings().weight
    block = block_bytes(loaded, on_accelerator=on_accelerator)
    # Every text's stream at every block; neutral texts side by side.
    streams = texts * (layer + 1) * n * d * loaded.dtype.itemsize
    plain = PLAIN_POSITIONS * (6 * d + 4 * _inner_size(loaded)) * loaded.dtype.itemsize
    # Each text's vectors are kept from block to block.
    arrays = (texts - 1 + (_SKETCH_COPIES if sketched else _EXACT_COPIES)) * width * n * d * itemsize
    square, rows = 8 * d * d, min(TABLE_ROWS_AT_ONCE, int(table.shape[0]))
    kept, root = (_ROOT_KEPT * square, _ROOT_COPIES * square + 8 * rows * d) if sketched else (0, 0)
    # By then, the weights of a block are as wide as the vectors.
    kept += _rounded_bytes(loaded, torch.float32) if sketched else 0
    at_once = max(block + kept + passes.fixed + max(arrays, plain, _recording(loaded, n)), root)
    return _with_allowance(table.numel() * table.dtype.itemsize + streams + at_once, passes.per_row)


def host_bytes(loaded: LoadedModel, n: int, rank: int | None) -> int:
    """What a build with streamed blocks takes of the host's memory where it computes on an accelerator.

    What is read from the files, and then the operator (``rank`` None: exact).
    """
    d, table = loaded.hidden_size, loaded.model.get_input_embeddings().weight
    operator = n * d * d if rank is None else (n + 1) * rank * d
    read = max(_read_block_bytes(loaded), max(_STORED, loaded.dtype.itemsize) * table.numel())
    return _with_allowance(max(read, _EXACT_COPIES * operator * _itemsize(loaded)), 0).fixed


def block_bytes(loaded: LoadedModel, *, on_accelerator: bool = False) -> int:
    """The largest block of a streamed model while it is in memory.

    In the model's dtype, and in that of the vectors; and as it is in the files, with the next one, which is read
    meanwhile: these are elsewhere for an accelerator, where tensors that are put together of others are there twice.
    """
    own, wide = loaded.dtype.itemsize, _itemsize(loaded)
    widened = wide if wide > own else 0
    computed = own + (max(own, widened) if on_accelerator else widened)
    return _largest_block(loaded) * computed + (0 if on_accelerator else _read_block_bytes(loaded))


def _read_block_bytes(loaded: LoadedModel) -> int:
    return 2 * max(_STORED, loaded.dtype.itemsize) * _largest_block(loaded)


def _largest_block(loaded: LoadedModel) -> int:
    return max(sum(weight.numel() for weight in block.parameters()) for block in decoder_layers(loaded.model))


def rows_within(
    budget: int,
    estimate: MemoryEstimate,
    limit: int,
    subject: str,
    remedy: str = "a lower rank or a shorter concept needs less",
    where: str = "beside the model",
    option: str = "--max-memory",
) -> int:
    """How many rows, up to ``limit``, a pass may have within ``budget`` bytes.

    Args:
        subject: what needs the memory, for the error.
        remedy: what would take less, for the error.
        where: what the memory is, for the error; ``option``: what bounds it.

    Raises:
        BuildError: not even one row fits; says how much is needed.
    """
    rows = (budget - estimate.fixed) // estimate.per_row
    if rows < 1:
        raise BuildError(
            f"{subject} needs about {format_bytes(estimate.fixed + estimate.per_row)} of memory {where}; "
            f"{format_bytes(max(budget, 0))} may be used ({option}; {remedy})"
        )
    return int(min(rows, limit))


def _with_allowance(fixed: int, per_row: int) -> MemoryEstimate:
    return MemoryEstimate(_LIBRARIES + math.ceil(_ALLOCATOR * fixed), math.ceil(_ALLOCATOR * per_row))


def _recording(loaded: LoadedModel, n: int) -> int:
    """What recording the last block of a text takes beside the tape, before any vector goes through it."""
    heads = int(loaded.model.config.get_text_config().num_attention_heads)
    return _RECORDED_COPIES * heads * n * n * loaded.dtype.itemsize


def _estimate_passes(loaded: LoadedModel, n: int, layer: int, texts: int) -> MemoryEstimate:
    """The replays of ``texts`` texts: their tapes, and what is alive in one pass."""
    config = loaded.model.config.get_text_config()
    d, inner = loaded.hidden_size, _inner_size(loaded)
    itemsize, heads = _itemsize(loaded), int(config.num_attention_heads)
    # The tape: attention weights, gates, the scales of two norms.
    tape = texts * layer * n * (heads * n + inner + 2) * itemsize
    if loaded.dtype.itemsize < itemsize:
        # Each text's graph keeps the attention weights as wide as its vectors, and a weight is widened as it is used.
        tape += texts * layer * heads * n * n * itemsize + d * inner * itemsize
    # Alive at once in a block: the stream, what the norms make of it, values and what attention makes of them, and
    # the inner layer before and after its gate; as much again for gradients. Every text keeps the input of its graph.
    # The backward pass of many cotangents copies a block's attention weights for each of them.
    return MemoryEstimate(fixed=tape, per_row=n * ((5 + texts) * d + 4 * inner + heads * n) * itemsize)


def _inner_size(loaded: LoadedModel) -> int:
    """The largest inner width of a block: the largest dimension of its weights, in practice the MLP's inner layer; of
    a mixture, what the experts of one token have together."""
    modules = [module for block in decoder_layers(loaded.model) for module in block.modules()]
    weights = (parameter for module in modules for parameter in module.parameters(recurse=False))
    largest = max(max(weight.shape) for weight in weights if weight.dim() == 2)
    chosen = int(getattr(loaded.model.config.get_text_config(), "num_experts_per_tok", None) or 0)
    return max(largest, *(chosen * _kept_per_expert(module) for module in modules), 0)


def _kept_per_expert(module: Any) -> int:
    """Numbers that a tape keeps of a token and an expert of it: its gates, and constants where experts have biases."""
    down = getattr(module, "down_proj", None)
    if not isinstance(down, torch.nn.Parameter):
        return 0
    width = int(down.shape[1 if module.is_transposed else 2])
    return 2 * width if module.has_bias else width


def _itemsize(loaded: LoadedModel) -> int:
    return torch.promote_types(loaded.dtype, torch.float32).itemsize
