"""Checks a stored lens against the model that it was built on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from operators.builder.checks import RECONSTRUCTION_TOLERANCE, dtype_name
from operators.builder.verify import check_compatible
from operators.core.artifact import OperatorArtifact
from operators.core.errors import BuildError, IncompatibleOperatorError, ReconstructionError
from operators.lens.build import check_unembedding
from operators.lens.matrices import encode_texts, texts_digest
from operators.lens.pulls import text_pulls
from operators.maps.jacobian import relative_error
from operators.model.loading import LoadedModel
from operators.model.unembedding import LoadedUnembedding, Unembedding

_PROBES = 4


def verify_lens(
    artifact: OperatorArtifact,
    loaded: LoadedModel,
    texts: Sequence[str],
    unembedding: Unembedding | LoadedUnembedding,
) -> float:
    """Computes products of the lens with random vectors anew, from its neutral texts, and compares.

    Returns:
        The relative error of J^T u over all probes u.

    Raises:
        BuildError: it is no lens, or the texts are not those that it was taken from.
        IncompatibleOperatorError: another model.
        ReconstructionError: the matrix, or the vocabulary's mean, is not what this model gives.
    """
    header = artifact.header
    check_compatible(header, loaded)
    if header.lens is None or artifact.lens is None:
        raise BuildError("this is no lens")
    if texts_digest(texts) != header.lens.texts_digest:
        raise BuildError(f"the lens was taken from {header.lens.texts} other neutral texts than the {len(texts)} given")
    check_unembedding(unembedding, loaded)
    if unembedding.vocabulary != header.lens.vocabulary:
        raise IncompatibleOperatorError(
            f"the unembedding has {unembedding.vocabulary} rows; the lens was built with {header.lens.vocabulary}"
        )
    dtype = max(header.model_dtype, dtype_name(loaded.dtype), key=RECONSTRUCTION_TOLERANCE.__getitem__)
    probes = torch.randn(_PROBES, header.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros_like(probes)
    for ids in encode_texts(texts, loaded):
        pulls, _ = text_pulls(loaded.model, ids, [header.layer], cotangents=probes)
        parts = {"first": ("first",), "others": ("others",), "all": ("first", "others")}[header.lens.positions]
        for part in parts:
            total += getattr(pulls[header.layer], part)
    error = relative_error(probes @ artifact.lens.pull.double().T, total / len(texts))
    mean_error = relative_error(artifact.lens.vocabulary_mean, unembedding.mean())
    for name, value in (("pull", error), ("vocabulary_mean", mean_error)):
        # Negated, so that NaN is refused too.
        if not value <= RECONSTRUCTION_TOLERANCE[dtype]:
            raise ReconstructionError(f"tensor {name!r} is off by {value:.1e} of what this model gives")
    return error
