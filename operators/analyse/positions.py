"""The map into the model's output embedding: its reconstruction, and each position's spectrum, tokens and share."""

from __future__ import annotations

import torch

from operators.analyse import spectra
from operators.analyse.frozen_blocks import ordinary_product
from operators.analyse.results import PositionAnalysis, Reconstruction, ScoredToken, SingularDirection, rounded
from operators.analyse.threads import one_thread
from operators.analyse.tokens import VocabularyProjection
from operators.core.header import Profile
from operators.core.progress import Progress
from operators.maps.jacobian import DenseMap, dense_map, relative_error
from operators.maps.reads import concept_terms, read_direction, term_sizes
from operators.maps.replay import Replay
from operators.model.loading import LoadedModel

PROFILE: Profile = "golden"
"""The target: the final norm of h^(layer), which at the last layer is the model's output embedding (Golden, fig. 1)."""
_ROWS_PER_PASS = 192
"""Rows of the Jacobian in one pass: the products of a short prompt are still small with fewer."""
_DIRECTIONS = 3
_TOKENS = 8


def output_map(loaded: LoadedModel, ids: tuple[int, ...], *, layer: int, progress: Progress) -> DenseMap:
    """The dense detached map into the output embedding, of layer ``layer``."""
    rows = 0

    def count(products: int) -> None:
        nonlocal rows
        # The last pass may have more cotangents than rows are left.
        rows = min(rows + products, loaded.hidden_size)
        progress("Jacobian rows", rows, loaded.hidden_size)

    with one_thread():
        replay = Replay(
            loaded.model, ids, layer=layer, profile=PROFILE, vectors_per_pass=_ROWS_PER_PASS, on_products=count
        )
    return dense_map(replay, rows_per_pass=_ROWS_PER_PASS)


def reconstruction(loaded: LoadedModel, ids: tuple[int, ...], output: DenseMap, *, layer: int) -> Reconstruction:
    """sum_i J_i x_i + c against h, component by component, for the detached map and for the ordinary Jacobian."""
    with one_thread():
        ordinary = ordinary_product(loaded.model, ids, layer=layer, profile=PROFILE)
    return Reconstruction(
        target=_numbers(output.y),
        detached=_numbers(output.reconstruction),
        ordinary=_numbers(ordinary),
        detached_error=rounded(output.reconstruction_error),
        ordinary_error=rounded(relative_error(ordinary, output.y)),
    )


def analyse_positions(
    ids: tuple[int, ...], output: DenseMap, vocabulary: VocabularyProjection, *, progress: Progress
) -> tuple[tuple[PositionAnalysis, ...], float]:
    """Spectrum, stable rank, tokens and share of each position; and the share of c, (h . c) / |h|^2."""
    y = output.y.double()
    analyses = []
    sizes = term_sizes(concept_terms(output.jacobian, None, output.x), y)
    for i, token in enumerate(ids):
        spectrum = spectra.full_spectrum(output.jacobian[i]).facing(output.x[i])
        left = vocabulary.top(vocabulary.logits(spectrum.left[:_DIRECTIONS], normed=True), _TOKENS)
        right = vocabulary.top(vocabulary.similarities(spectrum.right[:_DIRECTIONS]), _TOKENS)
        sigmas = _numbers(spectrum.values)
        analyses.append(
            PositionAnalysis(
                index=i,
                token=vocabulary.token(token),
                share=rounded(sizes[i].share),
                term_norm=rounded(sizes[i].norm),
                term_cosine=rounded(sizes[i].cosine),
                stable_rank=None if spectrum.stable_rank is None else rounded(spectrum.stable_rank),
                singular_values=sigmas,
                directions=tuple(SingularDirection(*triplet) for triplet in zip(sigmas, left, right, strict=False)),
            )
        )
        progress("Spectra", i + 1, len(ids))
    return tuple(analyses), rounded(float(y @ output.offset.double() / (y @ y)))


def readings(
    output: DenseMap, vocabulary: VocabularyProjection
) -> tuple[tuple[ScoredToken, ...], tuple[ScoredToken, ...]]:
    """The tokens that would move h most along itself in the last place, and most away: :mod:`operators.maps.reads`."""
    return vocabulary.both_ends(read_direction(output.jacobian, None, output.y), _TOKENS)


def _numbers(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(rounded(value) for value in values.double().tolist())
