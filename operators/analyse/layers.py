"""Layer by layer: what each block, its attention and its MLP do, on their own and from the embeddings on.

Everything here is exact. A single-layer map takes d columns at one position through one block. The cumulative map of
the last position is the product of these, because attention is causal: nothing but the last position sees it. That
of the first position is the stream of d columns, kept at all n positions and taken on block by block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from operators.analyse import spectra
from operators.analyse.maps import TARGETS, FrozenBlocks, Images, Target
from operators.analyse.results import Emergence, Layer, LayerMap, Place, Scope, Token, rounded
from operators.analyse.tokens import Readout, ranks
from operators.core.progress import Progress

_TRIPLETS = 2
_TOKENS = 6

Matrices = dict[tuple[Scope, Target, Place], torch.Tensor]
"""J (output, input) of each map into one layer."""


def layer_matrices(frozen: FrozenBlocks) -> Iterator[Matrices]:
    """Of layers 1 to L in turn, the 12 maps into each, (d, d). Holds n d^2 numbers for the first position's stream."""
    num_layers, n, d = frozen.shape
    unit = torch.eye(d, dtype=frozen.x.dtype, device=frozen.x.device)
    through_last = unit
    first_stream = unit.new_zeros(d, n, d)
    first_stream[:, 0] = unit
    for layer in range(1, num_layers + 1):
        found: Matrices = {}
        single = _matrices(frozen.push(layer, unit[:, None], [n - 1]))
        for target in TARGETS:
            found["single", target, "last"] = single[target]
            found["cumulative", target, "last"] = single[target] @ through_last
        through_last = found["cumulative", "block", "last"]
        if n > 1:
            ends = torch.stack([unit, torch.zeros_like(unit)], 1)
            single = _matrices(frozen.push(layer, ends, [0, n - 1]))
            images = frozen.push(layer, first_stream, range(n))
            first_stream = images.block
            cumulative = _matrices(images)
        else:
            cumulative = {target: found["cumulative", target, "last"] for target in TARGETS}
        for target in TARGETS:
            found["single", target, "first"] = single[target]
            found["cumulative", target, "first"] = cumulative[target]
        yield found


def layers(frozen: FrozenBlocks, readout: Readout, answer: int, *, progress: Progress) -> tuple[Layer, ...]:
    """Every layer described; ``answer`` is the id of the model's next token."""
    num_layers = frozen.shape[0]
    found = []
    for layer, matrices in enumerate(layer_matrices(frozen), start=1):
        found.append({key: _leading(frozen, layer, key, matrix) for key, matrix in matrices.items()})
        progress("Layers", layer, num_layers)
    final = found[-1]["cumulative", "block", "last"].left
    return tuple(_described(frozen, layer, maps, final, readout, answer) for layer, maps in enumerate(found, start=1))


def emergence(described: tuple[Layer, ...]) -> Emergence:
    """Where the answer appears and stays."""
    return Emergence(
        stream=settled([layer.lens_answer_rank for layer in described]),
        last=settled([layer.map("cumulative", "block", "last").answer_rank for layer in described]),
        first=settled([layer.map("cumulative", "block", "first").answer_rank for layer in described]),
    )


def settled(answer_ranks: list[int] | list[int | None]) -> int | None:
    """The first layer, from 1, from which on every rank is 1."""
    start = len(answer_ranks)
    while start > 0 and answer_ranks[start - 1] == 1:
        start -= 1
    return start + 1 if start < len(answer_ranks) else None


def _matrices(images: Images) -> dict[Target, torch.Tensor]:
    # Row k of the images is column k of the map.
    return {target: images.last(target).T for target in TARGETS}


def _leading(
    frozen: FrozenBlocks, layer: int, key: tuple[Scope, Target, Place], matrix: torch.Tensor
) -> spectra.Spectrum:
    scope, _, place = key
    source = frozen.x if scope == "cumulative" else frozen.stream(layer - 1)
    return spectra.leading(matrix, _TRIPLETS).facing(source[-1 if place == "last" else 0])


def _described(
    frozen: FrozenBlocks,
    layer: int,
    maps: dict[tuple[Scope, Target, Place], spectra.Spectrum],
    final: torch.Tensor,
    readout: Readout,
    answer: int,
) -> Layer:
    num_layers, _, _ = frozen.shape
    state, stream, end = frozen.states[layer - 1], frozen.stream(layer), frozen.stream(num_layers)[-1]
    tops = torch.stack([spectrum.left[0] for spectrum in maps.values()])
    logits = readout.logits(tops, normed=False)
    tokens, answer_ranks = readout.top(logits, _TOKENS), ranks(logits, answer)
    along = (tops @ final[:_TRIPLETS].T).abs().tolist()
    lens = readout.lens(stream[-1:])
    return Layer(
        index=layer,
        norm_last=_norm(stream[-1]),
        norm_first=_norm(stream[0]),
        norm_attention=_norm(state.attention[0]),
        norm_mlp=_norm(state.mlp[0]),
        along_final=rounded(float(torch.cosine_similarity(stream[-1].double(), end.double(), dim=0))),
        lens=readout.top(lens, _TOKENS)[0],
        lens_answer_rank=ranks(lens, answer)[0],
        maps=tuple(
            _summary(key, spectrum, answer_ranks[row], along[row], tokens[row])
            for row, (key, spectrum) in enumerate(maps.items())
        ),
    )


def _summary(
    key: tuple[Scope, Target, Place],
    spectrum: spectra.Spectrum,
    answer_rank: int,
    along_final: list[float],
    tokens: tuple[Token, ...],
) -> LayerMap:
    scope, target, place = key
    if spectrum.stable_rank is None:
        # A map that is zero has no directions.
        return LayerMap(scope, target, place, 0.0, None, None, None, ())
    return LayerMap(
        scope=scope,
        target=target,
        place=place,
        sigma=rounded(float(spectrum.values[0])),
        stable_rank=rounded(spectrum.stable_rank),
        answer_rank=answer_rank,
        along_final=(rounded(along_final[0]), rounded(along_final[1])),
        left=tokens,
    )


def _norm(vector: torch.Tensor) -> float:
    return rounded(float(torch.linalg.vector_norm(vector.double())))
