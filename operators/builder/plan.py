"""What a build will take, before a weight is read: passes, products, memory, and the time by what this machine does.

Time is the sum of what a build does, each part at a speed that is measured here (:mod:`operators.builder.machine`):

    start      modules are imported
    read       bytes from the files that are waited for: streamed blocks are read while others are worked on
    cast       bytes of weights that are copied, into the model's dtype and that of the vectors
    digest     sha256 over all weights, where this machine does not have it yet
    texts      the texts themselves and the neutral ones; for few rows, a weight takes as long as its bytes
    products   the FLOP of the products of the sketch
    root       C^{1/2} of the embedding table
    algebra    weighting and orthonormalising the vectors

It knows nothing of what else the machine will be doing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from operators.builder.machine import Machine
from operators.builder.memory import host_bytes
from operators.builder.spec import BuildSpec, estimate_memory, resolve_spec
from operators.maps.detach import FamilyRules, GatedMLP, Mixture, family_of
from operators.maps.sketch import num_products
from operators.maps.sweeps import GRADIENT_TOKENS
from operators.model.loading import LoadedModel, decoder_layers


@dataclass(frozen=True)
class BuildPlan:
    """Filled by :func:`plan_build`. Bytes, FLOP, seconds."""

    layer: int
    rank: int | None
    tokens: int
    texts: int
    streamed: bool
    passes: int
    products: int
    flop: float
    """Of the products."""
    weights: int
    """Of the whole model, in the dtype asked for."""
    read: int
    """From the files in all."""
    memory: int
    """The most that is held beside the program; of the host's memory where blocks are streamed to an accelerator."""
    device_memory: int | None
    """The most that is held on the accelerator, weights included; None where there is none."""
    seconds: float
    parts: dict[str, float]
    """The seconds by what takes them."""


def plan_build(
    spec: BuildSpec,
    loaded: LoadedModel,
    machine: Machine,
    *,
    streamed: bool,
    stored_itemsize: int,
    digested: bool,
    max_memory: int | None = None,
    neutral_tokens: int,
) -> BuildPlan:
    """What the build of ``spec`` takes on ``machine``, for a model of which only the shapes are looked at.

    Args:
        streamed: whether its blocks are read one at a time.
        stored_itemsize: bytes of a number in its files.
        digested: whether the digest of its files is kept on this machine.
        neutral_tokens: of all neutral texts.

    Raises:
        BuildError: as the build would, of its layer, rank and memory.
    """
    parameters = resolve_spec(spec, loaded, max_memory=max_memory, streamed=streamed)
    layer, rank, d, n = parameters.layer, parameters.rank, loaded.hidden_size, spec.num_positions
    texts, passes = len(spec.texts), spec.num_passes(rank) if streamed else 1
    products = (d if rank is None else spec.num_products(rank, d)) * texts
    estimate = estimate_memory(spec, loaded, layer, rank, streamed=streamed)
    held, on_device = estimate.fixed + parameters.vectors_per_pass * estimate.per_row, None
    blocks = decoder_layers(loaded.model)[:layer]
    counted = [_count(block, family_of(loaded.model), loaded) for block in blocks]
    flop = 2 * products * _positions(counted, n)
    model_numbers = sum(weight.numel() for weight in loaded.model.parameters())
    block_numbers = sum(weight.numel() for block in blocks for weight in block.parameters())
    if loaded.runs_on.type != "cpu":
        on_device = held if streamed else held + model_numbers * loaded.dtype.itemsize
        held = host_bytes(loaded, n, rank) if streamed else held
    table = loaded.model.get_input_embeddings().weight
    wide = max(loaded.dtype.itemsize, 4)
    # Read: what stays, the blocks in every pass; all of it where its digest is not known, or where it is not streamed.
    numbers = table.numel() + passes * block_numbers if streamed else model_numbers
    read = stored_itemsize * (numbers + (0 if digested or not streamed else model_numbers))
    # Beside the products: each text recorded, in every pass of streamed blocks; plain texts; the check of gradients.
    recorded = sum(len(text.ids) for text in spec.texts) * (passes if streamed else 1)
    few = texts * (passes if streamed else 1) + 1 + _GRADIENT_PASSES
    plain = neutral_tokens + sum(len(text.ids) for text in spec.texts)
    forward = sum(count.forward for count in counted)
    turns = passes if streamed else 1
    texts_seconds = 2 * forward * (recorded + plain + _GRADIENT_PASSES * GRADIENT_TOKENS) / machine.flop
    texts_seconds += few * wide * forward / machine.weights
    if streamed:
        # The attention of the first blocks is compared with the model's own, with zeros for their weights.
        compared = wide * _COMPARED_BLOCKS * block_numbers / layer
        texts_seconds += compared / machine.weights + compared / machine.cast
    cast = wide * (table.numel() + turns * (block_numbers if streamed else model_numbers)) / machine.cast
    products_seconds = flop / machine.flop
    reading = stored_itemsize * (passes * block_numbers if streamed else model_numbers) / machine.read
    if streamed:
        # A block is read while the one before is worked on.
        reading = max(reading / (passes * layer), reading - cast - texts_seconds - products_seconds)
        reading += stored_itemsize * table.numel() / machine.read
    all_bytes = stored_itemsize * model_numbers
    digest = max(all_bytes / machine.hashed, all_bytes / machine.read if streamed else 0.0)
    parts = {
        "start": machine.start,
        "read": reading,
        "cast": cast,
        "digest": 0.0 if digested else digest,
        "texts": texts_seconds,
        "products": products_seconds,
        "root": 0.0 if rank is None or spec.weighting == "white" else _root_seconds(table.shape, wide, machine),
        "algebra": 0.0 if rank is None else _algebra_flop(spec, rank, n, d) / machine.flop,
    }
    return BuildPlan(
        layer=layer,
        rank=rank,
        tokens=n,
        texts=texts,
        streamed=streamed,
        passes=passes,
        products=products,
        flop=flop,
        weights=model_numbers * loaded.dtype.itemsize,
        read=read,
        memory=held,
        device_memory=on_device,
        seconds=sum(parts.values()),
        parts=parts,
    )


_GRADIENT_PASSES = 4
"""Passes of few rows by which the gradients are checked: recorded, and replayed, each there and back."""


_COMPARED_BLOCKS = 8


@dataclass(frozen=True)
class _Count:
    """Weights of a block that a position is multiplied with."""

    forward: float
    replayed: float
    values: float
    """Of these, those of the values of attention, which a last block needs at every position."""


def _count(block: nn.Module, family: FamilyRules, loaded: LoadedModel) -> _Count:
    config = loaded.model.config.get_text_config()
    chosen = int(getattr(config, "num_experts_per_tok", None) or 0)
    shared = (
        int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) / config.num_attention_heads
    )
    forward = _active(block, chosen)
    frozen = values = 0.0
    for module in block.modules():
        attention, mlp = family.attentions.get(type(module)), family.mlps.get(type(module))
        if attention is not None:
            output = getattr(module, attention.output).weight.numel()
            values += shared * output
            frozen += _active(module, chosen) - output - shared * output
        elif isinstance(mlp, GatedMLP) and mlp.gate is not None:
            frozen += getattr(module, mlp.gate).weight.numel()
        elif isinstance(mlp, Mixture):
            frozen += _active(getattr(module, mlp.router), chosen) + _active(getattr(module, mlp.experts), chosen) / 3
    return _Count(forward, forward - frozen, values)


def _active(module: nn.Module, chosen: int) -> float:
    matrices = [weight for weight in module.parameters() if weight.dim() > 1]
    return sum(weight.numel() * (chosen / len(weight) if weight.dim() == 3 else 1) for weight in matrices)


def _positions(counted: list[_Count], n: int) -> float:
    """Weights times positions of one product; in the last block the values of all of them, and else the last one."""
    *inner, last = counted
    return n * (sum(count.replayed for count in inner) + last.values) + last.replayed - last.values


def _root_seconds(table: Any, wide: int, machine: Machine) -> float:
    """The second moment in the dtype of the vectors, and its Cholesky factor."""
    vocabulary, d = map(int, table)
    seconds: float = 2 * vocabulary * d * d / machine.flop + d**3 / 3 / machine.flop_double
    return seconds + wide * vocabulary * d / machine.cast


def _algebra_flop(spec: BuildSpec, rank: int, n: int, d: int) -> float:
    columns = num_products(rank, d, power_iterations=0, probes=0)
    weighted = 2 * (1 + spec.power_iterations) * columns * n * d * d * 2
    return weighted + _SLOW * 4 * (1 + spec.power_iterations) * n * d * columns**2


_SLOW = 5
"""How much longer a FLOP of a tall matrix's QR takes than one of a GEMM."""
