"""The map into the model's output embedding: does it give it back, and what is each position's part in it?"""

from __future__ import annotations

import torch

from operators.analyse import spectra
from operators.analyse.maps import ordinary_product
from operators.analyse.results import Direction, Position, Reconstruction, rounded
from operators.analyse.tokens import Readout
from operators.core.header import Profile
from operators.core.progress import Progress
from operators.maps.jacobian import LinearMap, exact, relative_error
from operators.maps.replay import Replay
from operators.model.loading import LoadedModel

PROFILE: Profile = "golden"
"""The target: the final norm of h^(layer), which at the last layer is the model's output embedding (Golden, fig. 1)."""
_DIRECTIONS = 3
_TOKENS = 8


def output_map(loaded: LoadedModel, ids: tuple[int, ...], *, layer: int, progress: Progress) -> LinearMap:
    """The exact detached map into the output embedding."""
    rows = 0

    def tick(columns: int) -> None:
        nonlocal rows
        rows = min(rows + columns, loaded.hidden_size)
        progress("Jacobian rows", rows, loaded.hidden_size)

    replay = Replay(loaded.model, ids, layer=layer, profile=PROFILE, tick=tick)
    return LinearMap(exact(replay), replay.x, replay.y, replay.offset)


def reconstruction(loaded: LoadedModel, ids: tuple[int, ...], found: LinearMap, *, layer: int) -> Reconstruction:
    """sum J x + c against h, component by component, for the detached map and for the ordinary Jacobian."""
    ordinary = ordinary_product(loaded.model, ids, layer=layer, profile=PROFILE)
    return Reconstruction(
        target=_numbers(found.y),
        detached=_numbers(found.reconstruction),
        ordinary=_numbers(ordinary),
        detached_error=rounded(found.reconstruction_error),
        ordinary_error=rounded(relative_error(ordinary, found.y)),
    )


def positions(
    ids: tuple[int, ...], found: LinearMap, readout: Readout, *, progress: Progress
) -> tuple[tuple[Position, ...], float]:
    """Spectrum, stable rank, tokens and share of each position; and the share of c."""
    y = found.y.double()
    described = []
    for i, token in enumerate(ids):
        spectrum = spectra.exact(found.jacobian[i]).facing(found.x[i])
        left = readout.top(readout.logits(spectrum.left[:_DIRECTIONS], normed=True), _TOKENS)
        right = readout.top(readout.similarities(spectrum.right[:_DIRECTIONS]), _TOKENS)
        sigmas = _numbers(spectrum.values)
        described.append(
            Position(
                index=i,
                token=readout.token(token),
                share=rounded(float(y @ (found.jacobian[i] @ found.x[i]).double() / (y @ y))),
                stable_rank=None if spectrum.stable_rank is None else rounded(spectrum.stable_rank),
                singular_values=sigmas,
                directions=tuple(Direction(*parts) for parts in zip(sigmas, left, right, strict=False)),
            )
        )
        progress("Spectra", i + 1, len(ids))
    return tuple(described), rounded(float(y @ found.offset.double() / (y @ y)))


def _numbers(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(rounded(value) for value in values.double().tolist())
