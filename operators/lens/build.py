"""Matrices in, lens out: the artifact that turns any word into a push."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from operators.builder.checks import dtype_name
from operators.core.artifact import Lens, OperatorArtifact, make_lens
from operators.core.built_at import built_at
from operators.core.dose_curve import DoseCurve
from operators.core.errors import ModelError
from operators.core.header import OperatorHeader, Recommended
from operators.core.lens_source import PUSHED, LensFinding, LensPositions, LensSource
from operators.core.version import __version__
from operators.lens.matrices import LensMatrices
from operators.maps.detach import RULE_SET
from operators.model.loading import LoadedModel
from operators.model.unembedding import LoadedUnembedding, Unembedding, loaded_unembedding

_ROUNDING = 1e-2
"""Of a row of the unembedding: what a checkpoint's dtype and the loaded one may differ by. bfloat16 rounds by 4e-3."""
_COMPARED_ROWS = 64


def check_unembedding(unembedding: Unembedding | LoadedUnembedding, loaded: LoadedModel) -> None:
    """Holds the rows that words will be made of to those of the model.

    Raises:
        ModelError: another size, or rows that differ by more than rounding: the files hold another head.
    """
    own = loaded_unembedding(loaded.model)
    expected, found = (own.vocabulary, own.hidden_size), (unembedding.vocabulary, unembedding.hidden_size)
    if expected != found:
        raise ModelError(f"{loaded.name}: its files have an unembedding of shape {found}; the model has {expected}")
    step = max(1, own.vocabulary // _COMPARED_ROWS)
    ids = range(0, own.vocabulary, step)
    expected_rows = own.rows(ids)
    difference = (unembedding.rows(ids) - expected_rows).norm(dim=1)
    # Not relative where a row is zero, as in padded vocabularies.
    if bool((difference > _ROUNDING * expected_rows.norm(dim=1) + 1e-6).any()):
        raise ModelError(f"{loaded.name}: the unembedding in its files is not the one that the model computes with")


def lens_artifact(
    matrices: LensMatrices,
    positions: LensPositions,
    layer: int,
    loaded: LoadedModel,
    *,
    vocabulary_mean: torch.Tensor,
    strength: float | None = None,
    default_kl: float | None = None,
    curve: DoseCurve | None = None,
    findings: Sequence[LensFinding] = (),
) -> OperatorArtifact:
    """The lens of one kind of positions at one layer.

    Args:
        vocabulary_mean: (d,) float32, of the unembedding's rows.
        strength, default_kl: what is recommended, and the p95 KL that it has on ``curve``; both or neither.
    """
    unembedding = loaded_unembedding(loaded.model)
    source = LensSource(
        positions=positions,
        texts=matrices.texts,
        texts_digest=matrices.texts_digest,
        vocabulary=unembedding.vocabulary,
        tied=unembedding.tied,
        reconstruction_error=matrices.reconstruction_error,
        curve=curve,
        default_kl=default_kl,
        findings=tuple(findings),
    )
    header = OperatorHeader(
        concept="any word",
        concept_ids=(),
        lens=source,
        model=loaded.name,
        architecture=type(loaded.model).__name__,
        model_fingerprint=loaded.fingerprint,
        tokenizer_fingerprint=loaded.tokenizer_fingerprint,
        profile="residual",
        rule_set=RULE_SET,
        layer=layer,
        injection_layer=layer,
        num_layers=loaded.num_layers,
        hidden_size=loaded.hidden_size,
        dtype="float32",
        model_dtype=dtype_name(loaded.dtype),
        attention=loaded.attention,
        recommended=Recommended(strength=strength or 0.0, blend=1.0, positions=PUSHED[positions]),
        builder_version=__version__,
        created=built_at(),
    )
    return make_lens(header, Lens(matrices.pull(positions, layer), vocabulary_mean))
