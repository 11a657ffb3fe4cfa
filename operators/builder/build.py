"""Concept and model in, verified operator out."""

from __future__ import annotations

import torch

from operators.builder.checks import (
    check_basis,
    check_reconstruction,
    dtype_name,
    worst_reconstruction_error,
)
from operators.builder.mapped import map_texts
from operators.builder.memory import range_dtype
from operators.builder.neutral import check_contrast_anchor, tokenise_neutral
from operators.builder.spec import BuildSpec, resolve_spec, vectors_per_pass
from operators.core import capacity
from operators.core.artifact import OperatorArtifact, make_artifact
from operators.core.built_at import built_at
from operators.core.errors import BuildError, ReconstructionError
from operators.core.header import ConceptText, LowRank, NeutralTexts, OperatorHeader, injection_layer
from operators.core.progress import Progress, silent
from operators.core.version import __version__
from operators.maps.detach import RULE_SET
from operators.maps.jacobian import exact_jacobian
from operators.maps.replay import VECTORS_PER_PASS, AffineMap
from operators.maps.sketch import (
    OVERSAMPLE,
    LowRankMap,
    embedding_root,
    sketch,
    sketch_within,
)
from operators.model.loading import LoadedModel


@capacity.memory_errors_as_build_errors()
def build_operator(
    spec: BuildSpec,
    loaded: LoadedModel,
    *,
    root: torch.Tensor | None = None,
    max_memory: int | None = None,
    progress: Progress = silent,
) -> OperatorArtifact:
    """Computes an operator and checks it against the model before anybody can use it.

    Args:
        root: C^{1/2} (d, d) of :func:`~operators.maps.sketch.embedding_root`, shared by many builds on one model; None
            means that it is computed where the sketch needs it.
        max_memory: bound of the bytes that the build takes beside the loaded model (its weights and the program), or
            beside the program where the model's blocks are streamed; None means most of what is free.
        progress: receives the JVPs and VJPs done, and how many there will be; the total grows while the rank for a
            tolerance is searched for.

    Raises:
        BuildError: the layer, rank or tolerance is out of range; or the operator takes more memory than there is,
            or would be larger than any reader accepts; or the first tokens do not reach the layer.
        UnsupportedModelError: the architecture has no detach table.
        ReconstructionError: the detached forward pass or the reconstruction is off, or the map is not finite.
    """
    parameters = resolve_spec(spec, loaded, max_memory=max_memory)
    layer, rank, d = parameters.layer, parameters.rank, loaded.hidden_size
    products = _ProductProgress(progress, (d if rank is None else spec.num_products(rank, d)) * len(spec.texts))
    neutral = tokenise_neutral(loaded) if spec.neutral is None else spec.neutral
    mapped = map_texts(spec, loaded, parameters, neutral, on_products=products.add, progress=progress)
    weighted_map = mapped.summed
    low_rank_map = _approximate(spec, weighted_map, loaded, layer, rank, root, max_memory)
    if low_rank_map is None:
        # Of streamed blocks, each product is a pass over all of them.
        rows = VECTORS_PER_PASS if loaded.blocks is None else d
        factors, basis = exact_jacobian(weighted_map, rows_per_pass=rows), None
    else:
        factors, basis = low_rank_map.factors, low_rank_map.basis
    if loaded.blocks is None:
        products.finish()
    _check_factors(factors, spec, layer)
    if basis is not None:
        check_basis(basis, weighted_map.y - weighted_map.offset, dtype_name(loaded.dtype))
    error = worst_reconstruction_error(mapped.texts, factors, basis)
    check_reconstruction(error, layer, dtype_name(loaded.dtype))
    y = weighted_map.y
    mean = sum(spec.shares) * mapped.neutral.to(y)
    check_contrast_anchor(y, mean, spec.texts)
    header = _header(spec, loaded, layer, low_rank_map, y.dtype, error, neutral)
    offset = weighted_map.offset if bool(weighted_map.offset.any()) else None
    base = weighted_map.substitute_base(basis)
    return make_artifact(header, factors, y, base, offset, basis=basis, neutral=mean)


def _approximate(
    spec: BuildSpec,
    weighted_map: AffineMap,
    loaded: LoadedModel,
    layer: int,
    rank: int | None,
    root: torch.Tensor | None,
    max_memory: int | None,
) -> LowRankMap | None:
    """The low-rank map that ``spec`` asks for; None means the exact operator, which is then known to fit."""
    if rank is None:
        return None
    if spec.weighting == "white":
        root = None
    elif root is None:
        root = embedding_root(loaded.model.get_input_embeddings().weight)
    if spec.tolerance is None:
        return sketch(weighted_map, rank, root=root, seed=spec.seed, rounded_to=range_dtype(loaded))

    def check_rank(rank: int | None) -> None:
        vectors_per_pass(spec, loaded, layer, rank, max_memory=max_memory)

    low_rank_map = sketch_within(weighted_map, spec.tolerance, root=root, seed=spec.seed, check_rank=check_rank)
    if low_rank_map is None:
        check_rank(None)
    return low_rank_map


def _header(
    spec: BuildSpec,
    loaded: LoadedModel,
    layer: int,
    low_rank_map: LowRankMap | None,
    dtype: torch.dtype,
    reconstruction_error: float,
    neutral: NeutralTexts,
) -> OperatorHeader:
    first, *more = spec.texts
    low_rank = None
    if low_rank_map is not None:
        low_rank = LowRank(
            rank=low_rank_map.basis.shape[1],
            residuals=low_rank_map.residuals,
            weighting=spec.weighting,
            oversample=OVERSAMPLE,
            power_iterations=spec.power_iterations,
            seed=spec.seed,
        )
    return OperatorHeader(
        concept=first.text,
        concept_ids=first.ids,
        concept_tokens=tuple(loaded.tokenizer.decode([token]) for token in first.ids),
        more_texts=tuple(ConceptText(text=text.text, ids=text.ids) for text in more),
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
        dtype=dtype_name(dtype),
        model_dtype=dtype_name(loaded.dtype),
        attention=loaded.attention,
        low_rank=low_rank,
        neutral=neutral,
        tolerance=spec.tolerance,
        words=spec.words,
        recommended=spec.setting_on(loaded),
        reconstruction_error=reconstruction_error,
        builder_version=__version__,
        created=built_at(),
    )


def _check_factors(factors: torch.Tensor, spec: BuildSpec, layer: int) -> None:
    """Refuses factors (n, r, d) that are not finite, or that have a zero block.

    The published rule takes the direction for a request's first token from the first block; a zero block has none.
    """
    text = spec.texts[0].text
    if not bool(torch.isfinite(factors).all()):
        raise ReconstructionError(f"the map of {text!r} at layer {layer} is not finite")
    reaches = factors.flatten(1).abs().amax(1) > 0
    if not bool(reaches.all()):
        n, lost = len(reaches), int((~reaches).sum())
        raise BuildError(
            f"the first {lost} of the {n} tokens of {text!r} do not reach layer {layer} (attention "
            f"windows end before them); concepts of at most {n - lost} tokens, or a later layer, are accepted"
        )


class _ProductProgress:
    """Counts the JVPs and VJPs of all replays. ``expected`` is exact but where a rank is searched for."""

    def __init__(self, progress: Progress, expected: int) -> None:
        self._progress, self._done, self._total = progress, 0, expected

    def add(self, products: int) -> None:
        self._done += products
        self._total = max(self._total, self._done)
        self._report()

    def finish(self) -> None:
        self._total = self._done
        self._report()

    def _report(self) -> None:
        self._progress("Jacobian products", self._done, self._total)
