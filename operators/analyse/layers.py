"""Layer by layer: what each block, its attention and its MLP do, on their own and from the embeddings on.

The maps are exact matrices (d, d), J (output, input), into the last position; singular values and vectors are those of
``spectra.leading_triplets``. A single-layer map is d JVPs of one block, at one source position. The cumulative map of
the last position is the product of these, because attention is causal: nothing but the last position reads it. That of
the first position takes d tangents through all blocks, at all n positions.

Cost per layer: 3 d JVPs of one block, d of them at all n positions and 2 d at the last one only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from operators.analyse import spectra
from operators.analyse.frozen_blocks import BlockOutputs, FrozenBlocks
from operators.analyse.results import (
    TARGETS,
    Emergence,
    LayerAnalysis,
    LayerMap,
    Scope,
    ScoredToken,
    SourcePosition,
    Target,
    rounded,
)
from operators.analyse.threads import one_thread
from operators.analyse.tokens import VocabularyProjection, ranks
from operators.core.progress import Progress

_TRIPLETS = 2
"""Leading triplets of each map: u_1 is read as tokens; others are projected on u_1 and u_2 of the last layer."""
_TOKENS = 6

_Key = tuple[Scope, Target, SourcePosition]
Matrices = dict[_Key, torch.Tensor]
"""J (output, input) of each map into one layer."""


def layer_matrices(frozen: FrozenBlocks) -> Iterator[Matrices]:
    """For layers 1 to L in turn, the 12 maps into each, (d, d). Holds n d^2 numbers from layer to layer."""
    num_layers, n, d = frozen.shape
    identity = torch.eye(d, dtype=frozen.x.dtype, device=frozen.x.device)
    cumulative_last = identity
    # The d unit tangents at the first position, as they arrive at each layer.
    first_tangents = identity.new_zeros(d, n, d)
    first_tangents[:, 0] = identity
    for layer in range(1, num_layers + 1):
        matrices: Matrices = {}
        single = _matrices(frozen.jvp(layer, identity[:, None], [n - 1]))
        for target in TARGETS:
            matrices["single", target, "last"] = single[target]
            matrices["cumulative", target, "last"] = single[target] @ cumulative_last
        cumulative_last = matrices["cumulative", "block", "last"]
        if n > 1:
            first_only = torch.stack([identity, torch.zeros_like(identity)], 1)
            single = _matrices(frozen.jvp(layer, first_only, [0, n - 1], last_only=True))
            outputs = frozen.jvp(layer, first_tangents, range(n))
            first_tangents = outputs.block
            cumulative = _matrices(outputs)
        else:
            cumulative = {target: matrices["cumulative", target, "last"] for target in TARGETS}
        for target in TARGETS:
            matrices["single", target, "first"] = single[target]
            matrices["cumulative", target, "first"] = cumulative[target]
        yield matrices


def analyse_layers(
    frozen: FrozenBlocks, vocabulary: VocabularyProjection, answer: int, *, progress: Progress
) -> tuple[LayerAnalysis, ...]:
    """Every layer, from 1 to L; ``answer`` is the id of the model's next token."""
    num_layers = frozen.shape[0]
    spectra_by_layer = []
    for layer, matrices in enumerate(layer_matrices(frozen), start=1):
        spectra_by_layer.append({key: _leading(frozen, layer, key, matrix) for key, matrix in matrices.items()})
        progress("Layers", layer, num_layers)
    final = spectra_by_layer[-1]["cumulative", "block", "last"].left
    with one_thread():
        return tuple(
            _layer_analysis(frozen, layer, maps, final, vocabulary, answer)
            for layer, maps in enumerate(spectra_by_layer, start=1)
        )


def emergence(layers: tuple[LayerAnalysis, ...]) -> Emergence:
    """From which layer on the model's next token is the top token, in the stream and in u_1 of the cumulative maps."""
    return Emergence(
        stream=settled_layer([layer.lens_answer_rank for layer in layers]),
        last=settled_layer([layer.map("cumulative", "block", "last").answer_rank for layer in layers]),
        first=settled_layer([layer.map("cumulative", "block", "first").answer_rank for layer in layers]),
    )


def settled_layer(answer_ranks: list[int] | list[int | None]) -> int | None:
    """The first layer, from 1, from which on every rank is 1; None where the last rank is not 1."""
    start = len(answer_ranks)
    while start > 0 and answer_ranks[start - 1] == 1:
        start -= 1
    return start + 1 if start < len(answer_ranks) else None


def _matrices(outputs: BlockOutputs) -> dict[Target, torch.Tensor]:
    # The output for unit tangent k is column k of the map.
    return {target: outputs.last(target).T for target in TARGETS}


def _leading(frozen: FrozenBlocks, layer: int, key: _Key, matrix: torch.Tensor) -> spectra.Spectrum:
    scope, _, place = key
    source = frozen.x if scope == "cumulative" else frozen.stream(layer - 1)
    return spectra.leading_triplets(matrix, _TRIPLETS).facing(source[-1 if place == "last" else 0])


def _layer_analysis(
    frozen: FrozenBlocks,
    layer: int,
    maps: dict[_Key, spectra.Spectrum],
    final: torch.Tensor,
    vocabulary: VocabularyProjection,
    answer: int,
) -> LayerAnalysis:
    num_layers, _, _ = frozen.shape
    state, stream, end = frozen.states[layer - 1], frozen.stream(layer), frozen.stream(num_layers)[-1]
    tops = torch.stack([spectrum.left[0] for spectrum in maps.values()])
    logits = vocabulary.logits(tops, normed=False)
    tokens, answer_ranks = vocabulary.top(logits, _TOKENS), ranks(logits, answer)
    along = (tops @ final[:_TRIPLETS].T).abs().tolist()
    lens = vocabulary.lens(stream[-1:])
    return LayerAnalysis(
        index=layer,
        norm_last=_norm(stream[-1]),
        norm_first=_norm(stream[0]),
        norm_attention=_norm(state.attention[0]),
        norm_mlp=_norm(state.mlp[0]),
        along_final=rounded(float(torch.cosine_similarity(stream[-1].double(), end.double(), dim=0))),
        lens=vocabulary.top(lens, _TOKENS)[0],
        lens_answer_rank=ranks(lens, answer)[0],
        maps=tuple(
            _layer_map(key, spectrum, answer_ranks[row], along[row], tokens[row])
            for row, (key, spectrum) in enumerate(maps.items())
        ),
    )


def _layer_map(
    key: _Key,
    spectrum: spectra.Spectrum,
    answer_rank: int,
    along_final: list[float],
    tokens: tuple[ScoredToken, ...],
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
