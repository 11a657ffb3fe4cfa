"""A vector as an operator: of rank 0, with nothing but its anchor."""

from __future__ import annotations

import torch

from operators.builder.checks import dtype_name
from operators.builder.spec import resolve_layer
from operators.core.apply import Setting
from operators.core.artifact import OperatorArtifact, make_vector
from operators.core.built_at import built_at
from operators.core.defaults import new_vectors
from operators.core.errors import VectorError
from operators.core.header import MAX_CONCEPT, OperatorHeader, Recommended
from operators.core.vector_source import VectorSource
from operators.core.version import __version__
from operators.model.loading import LoadedModel


def check_description(about: str | None, strength: float | None) -> None:
    """Checks what a person says about a vector, where it is said.

    Raises:
        VectorError: ``about`` is empty, too long, or not Unicode.
        SettingError: ``strength`` is not finite.
    """
    if strength is not None:
        Setting(strength, "cumulative", 1.0)
    if about is None:
        return
    if not about.strip() or len(about) > MAX_CONCEPT:
        raise VectorError(f"about has {len(about.strip())} characters; 1 to {MAX_CONCEPT} are accepted")
    try:
        about.encode()
    except UnicodeEncodeError as error:
        raise VectorError(f"about {about[:40]!r} is not Unicode text (at character {error.start})") from error


def vector_norm(vector: torch.Tensor, subject: str) -> float:
    """|v| of a vector (d,) that can push.

    Raises:
        VectorError: it has another number of axes, is not of floating-point numbers, or its norm in float32, in which
            pushes are computed, is zero or not finite.
    """
    if vector.ndim != 1 or not vector.is_floating_point():
        dtype = str(vector.dtype).removeprefix("torch.")
        raise VectorError(f"{subject} is {dtype} of shape {tuple(vector.shape)}; a vector of floats is accepted")
    if not bool(torch.isfinite(vector).all()):
        raise VectorError(f"{subject} has values that are not finite")
    norm = float(torch.linalg.vector_norm(vector.to(torch.float32)))
    if not 0.0 < norm < float("inf"):
        raise VectorError(f"{subject} has norm {norm:g} in float32; a positive, finite one is needed")
    return float(torch.linalg.vector_norm(vector.double()))


def vector_operator(
    vector: torch.Tensor,
    source: VectorSource,
    loaded: LoadedModel,
    *,
    layer: int,
    about: str,
    strength: float | None = None,
    subject: str = "the vector",
) -> OperatorArtifact:
    """The operator that pushes the input of block ``layer`` along ``vector`` (d,), which is stored as it is.

    Args:
        source: where it comes from; the caller computed its norm.
        about: what it is, in words; the operator's concept.
        strength: to recommend; None means the default of new operators on this model.
        subject: names the vector in errors.

    Raises:
        BuildError: the model has no such layer.
        VectorError, SettingError: the vector is not as wide as the model; :func:`check_description`.
    """
    check_description(about, strength)
    layer = resolve_layer(layer, "residual", loaded)
    if len(vector) != loaded.hidden_size:
        raise VectorError(
            f"{subject} has {len(vector)} numbers; {loaded.name} has hidden size {loaded.hidden_size}: it is of "
            "another model"
        )
    architecture = type(loaded.model).__name__
    recommended = new_vectors(architecture) if strength is None else Recommended(strength=strength, blend=1.0)
    header = OperatorHeader(
        concept=about,
        concept_ids=(),
        vector=source,
        model=loaded.name,
        architecture=architecture,
        model_fingerprint=loaded.fingerprint,
        tokenizer_fingerprint=loaded.tokenizer_fingerprint,
        profile="residual",
        rule_set="",
        layer=layer,
        injection_layer=layer,
        num_layers=loaded.num_layers,
        hidden_size=loaded.hidden_size,
        dtype=dtype_name(vector.dtype),
        model_dtype=dtype_name(loaded.dtype),
        attention=loaded.attention,
        recommended=recommended,
        builder_version=__version__,
        created=built_at(),
    )
    return make_vector(header, vector)
