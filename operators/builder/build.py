"""Concept and model in, verified operator out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import torch

from operators.builder import memory
from operators.builder.checks import check_basis, check_map, check_reconstruction, dtype_name, reconstruction_error
from operators.builder.concept import Concept
from operators.core import capacity
from operators.core.artifact import MAX_BYTES, OperatorArtifact, injection_layer, make_artifact
from operators.core.errors import BuildError, ReconstructionError
from operators.core.header import ConceptText, LowRank, Member, OperatorHeader, Profile, Recommended
from operators.core.version import __version__
from operators.maps.detach import RULE_SET
from operators.maps.jacobian import exact
from operators.maps.replay import COLUMNS_PER_PASS, Replay
from operators.maps.sketch import (
    FIRST_RANK,
    OVERSAMPLE,
    POWER_ITERATIONS,
    Reduced,
    embedding_root,
    num_products,
    sketch,
    sketch_within,
)
from operators.maps.weighted_map import MeanMap
from operators.model.loading import LoadedModel

DEFAULT_RANK = 64

Progress = Callable[[int, int], None]
"""Called with (columns done, columns in all); the second grows while a tolerance is searched for."""


@dataclass(frozen=True)
class BuildSpec:
    """What to build: one concept of one or more texts.

    ``layer`` None takes the profile's default, floor(2L/3). ``rank`` None takes DEFAULT_RANK, or the exact operator
    where that is no larger. ``tolerance`` asks for the smallest rank with that residual |J - U B|_F / |J|_F.
    ``weights`` are those of a mixture's texts (:mod:`operators.builder.combine`); without, the operator is their mean.
    """

    texts: tuple[Concept, ...]
    profile: Profile = "residual"
    layer: int | None = None
    rank: int | Literal["full"] | None = None
    tolerance: float | None = None
    weighting: Literal["embedding", "white"] = "embedding"
    seed: int = 0
    words: tuple[str, ...] = ()
    recommended: Recommended = field(default_factory=Recommended)
    weights: tuple[float, ...] = ()
    members: tuple[Member, ...] = ()

    @property
    def shares(self) -> tuple[float, ...]:
        """The weight of each text's map in the operator's."""
        return self.weights or (1.0 / len(self.texts),) * len(self.texts)


@capacity.shortage_told()
def build_operator(
    spec: BuildSpec,
    loaded: LoadedModel,
    *,
    root: torch.Tensor | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> OperatorArtifact:
    """Computes an operator and checks it against the model before anybody can use it.

    Args:
        root: C^{1/2} of :func:`~operators.maps.sketch.embedding_root`, for many builds; computed when not given.
        max_memory: bytes beside the model; most of what is free when not given.

    Raises:
        BuildError: the layer, rank or tolerance is out of range, or the operator takes more memory than there is,
            or would be larger than any reader takes.
        UnsupportedModelError: the architecture has no detach table.
        ReconstructionError: the detached forward or the reconstruction is off.
    """
    layer, rank, columns = check_spec(spec, loaded, max_memory=max_memory)
    exactly = rank is None and spec.tolerance is None
    products = loaded.hidden_size if exactly else num_products(rank or FIRST_RANK, loaded.hidden_size)
    ticker = _Ticker(progress, products * len(spec.texts))
    replays = [
        Replay(loaded.model, text.ids, layer=layer, profile=spec.profile, columns=columns, tick=ticker)
        for text in spec.texts
    ]
    for text, replay in zip(spec.texts, replays, strict=True):
        check_map(text, replay, loaded, layer=layer, profile=spec.profile)
    concept = MeanMap(replays, spec.shares)

    def check(tried: int) -> None:
        _columns(spec, loaded, layer, tried, max_memory)

    found = _reduced(spec, concept, rank, root, loaded, check)
    if found is None:
        _columns(spec, loaded, layer, None, max_memory)
    factors, basis = (exact(concept), None) if found is None else (found.factors, found.basis)
    ticker.finish()
    if not bool(torch.isfinite(factors).all()):
        raise ReconstructionError(f"the map of {spec.texts[0].text!r} at layer {layer} is not finite")
    _check_reach(factors, spec, layer)
    if basis is not None:
        check_basis(basis, concept.y - concept.offset, dtype_name(loaded.dtype))
    last = concept.last_term if basis is None else basis @ (basis.T @ concept.last_term)
    header = OperatorHeader(
        concept=spec.texts[0].text,
        concept_ids=spec.texts[0].ids,
        more_texts=tuple(ConceptText(text=more.text, ids=more.ids) for more in spec.texts[1:]),
        weights=spec.weights,
        members=spec.members,
        model=loaded.name,
        architecture=type(loaded.model).__name__,
        model_fingerprint=loaded.fingerprint,
        tokenizer_fingerprint=loaded.tokenizer_fingerprint,
        profile=spec.profile,
        rule_set=RULE_SET,
        layer=layer,
        injection_layer=injection_layer(spec.profile, layer),
        num_layers=loaded.num_layers,
        hidden_size=loaded.hidden_size,
        dtype=dtype_name(concept.y.dtype),
        model_dtype=dtype_name(loaded.dtype),
        low_rank=None if found is None else _low_rank(spec, found),
        tolerance=spec.tolerance,
        words=spec.words,
        recommended=spec.recommended,
        reconstruction_error=max(reconstruction_error(replay, factors, basis, replays) for replay in replays),
        builder_version=__version__,
        created=datetime.now(UTC).replace(microsecond=0),
    )
    check_reconstruction(header.reconstruction_error, layer, header.model_dtype)
    offset = concept.offset if bool(concept.offset.any()) else None
    return make_artifact(header, factors, concept.y, concept.y - last, offset, basis=basis)


def check_spec(spec: BuildSpec, loaded: LoadedModel, *, max_memory: int | None = None) -> tuple[int, int | None, int]:
    """The layer, the rank (None: exact, or what the tolerance needs) and the columns per pass of a build.

    Raises:
        BuildError: the layer, rank or tolerance is out of range, or the operator takes more memory than there is,
            or would be larger than any reader takes.
    """
    layer = check_layer(spec.layer, spec.profile, loaded)
    rank = _rank(spec, loaded)
    first = FIRST_RANK if spec.tolerance is not None else rank
    return layer, rank, _columns(spec, loaded, layer, first, max_memory)


def check_layer(layer: int | None, profile: Profile, loaded: LoadedModel) -> int:
    """The layer to build at. Raises :class:`BuildError` when there is no such layer for this profile."""
    if layer is None:
        return max(1, 2 * loaded.num_layers // 3)
    # The residual operator is added to the input of block `layer`, so that block must exist.
    last = loaded.num_layers if profile == "golden" else loaded.num_layers - 1
    if not 1 <= layer <= last:
        raise BuildError(f"layer {layer} of {loaded.name} for profile {profile!r}; 1 to {last} are accepted")
    return layer


def _rank(spec: BuildSpec, loaded: LoadedModel) -> int | None:
    """The rank to sketch; None for the exact operator, or where a tolerance decides."""
    d, n = loaded.hidden_size, max(len(text.ids) for text in spec.texts)
    if spec.tolerance is not None:
        if spec.rank is not None:
            raise BuildError(f"rank {spec.rank} and tolerance {spec.tolerance:g} were both given; one is accepted")
        if not 0.0 < spec.tolerance < 1.0:
            raise BuildError(f"tolerance is {spec.tolerance:g}; a number between 0 and 1 is accepted")
        return None
    if spec.rank == "full":
        return None
    if spec.rank is None:
        return DEFAULT_RANK if DEFAULT_RANK * (n + 1) < n * d and d > DEFAULT_RANK else None
    if not 1 <= spec.rank <= d:
        raise BuildError(f"rank is {spec.rank}; 1 to {d} (the hidden size of {loaded.name}) or 'full' are accepted")
    return spec.rank


def _columns(spec: BuildSpec, loaded: LoadedModel, layer: int, rank: int | None, max_memory: int | None) -> int:
    """Columns per pass, after checking that an operator of this rank (None: exact) fits into memory and into a file."""
    n, d, texts = max(len(text.ids) for text in spec.texts), loaded.hidden_size, len(spec.texts)
    itemsize = torch.promote_types(loaded.dtype, torch.float32).itemsize
    numbers = n * d * d if rank is None else (n + 1) * rank * d
    if numbers * itemsize > MAX_BYTES:
        raise BuildError(
            f"the operator of {n} tokens at hidden size {d} takes {numbers * itemsize} bytes; at most {MAX_BYTES} are "
            "accepted"
        )
    if rank is None:
        need = memory.exact_need(loaded, n, layer, texts)
    else:
        need = memory.sketch_need(loaded, n, layer, num_products(rank, d, power_iterations=0), texts)
    budget = capacity.free(loaded.device) if max_memory is None else max_memory
    what = f"the operator of {n} tokens of {loaded.name} at layer {layer}"
    return memory.columns_within(budget, need, COLUMNS_PER_PASS, what)


def _reduced(
    spec: BuildSpec,
    concept: MeanMap,
    rank: int | None,
    root: torch.Tensor | None,
    loaded: LoadedModel,
    check: Callable[[int], None],
) -> Reduced | None:
    if rank is not None:
        return sketch(concept, rank, root=_root(spec, root, loaded), seed=spec.seed)
    if spec.tolerance is not None:
        return sketch_within(concept, spec.tolerance, root=_root(spec, root, loaded), seed=spec.seed, check=check)
    return None


def _root(spec: BuildSpec, given: torch.Tensor | None, loaded: LoadedModel) -> torch.Tensor | None:
    if spec.weighting == "white":
        return None
    return embedding_root(loaded.model.get_input_embeddings().weight) if given is None else given


def _low_rank(spec: BuildSpec, found: Reduced) -> LowRank:
    return LowRank(
        rank=found.basis.shape[1],
        residuals=found.residuals,
        weighting=spec.weighting,
        oversample=OVERSAMPLE,
        power_iterations=POWER_ITERATIONS,
        seed=spec.seed,
    )


def _check_reach(factors: torch.Tensor, spec: BuildSpec, layer: int) -> None:
    # Without a block, the published rule has no direction for a request's first token.
    reached = factors.flatten(1).abs().amax(1) > 0
    if not bool(reached.all()):
        n, lost = len(reached), int((~reached).sum())
        raise BuildError(
            f"the first {lost} of the {n} tokens of {spec.texts[0].text!r} do not reach layer {layer} (attention "
            f"windows end before them); concepts of at most {n - lost} tokens, or a later layer, are accepted"
        )


class _Ticker:
    """Counts columns for a progress bar. What a search for a tolerance will take is not known beforehand."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def __call__(self, columns: int) -> None:
        self._done += columns
        self._total = max(self._total, self._done)
        self._tell()

    def finish(self) -> None:
        self._total = self._done
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total)
