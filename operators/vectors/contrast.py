"""The difference of mean hidden states of two sets of texts, a baseline that many papers steer with.

    v = (1/P) sum_p h^(s)(p) - (1/N) sum_n h^(s)(n)

with h^(s)(t) (d,) the input of block s at the last token of text t, summed in float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from operators.builder.checks import RECONSTRUCTION_TOLERANCE, dtype_name
from operators.builder.concept import Concept, concept_from_text
from operators.builder.neutral import last_target
from operators.builder.spec import resolve_layer
from operators.core.artifact import OperatorArtifact
from operators.core.errors import ArtifactError, ConceptError, ReconstructionError, VectorError
from operators.core.file_format import open_regular
from operators.core.progress import Progress, silent
from operators.core.vector_source import MAX_WORD, ContrastVector, TextFile
from operators.model.loading import LoadedModel
from operators.vectors.vector_operator import vector_operator

_MAX_BYTES = 64 << 20
_CANCELLED = 1e-6
"""Means are equal where they differ by less than this share of the hidden states' mean norm: rounding of float32."""


@dataclass(frozen=True)
class TextSet:
    """The texts of a file, one or more. Filled by :func:`read_texts`."""

    name: str
    digest: str
    """sha256 of the file's bytes."""
    texts: tuple[str, ...]

    @property
    def described(self) -> TextFile:
        """The file without its texts."""
        # A file's name may be bytes that are no text, which no header can hold.
        name = self.name.encode(errors="replace").decode()[:MAX_WORD]
        return TextFile(name=name, digest=self.digest, texts=len(self.texts))


def read_texts(path: Path) -> TextSet:
    """The texts of a UTF-8 file, one per line.

    Raises:
        VectorError: it cannot be read, has no line, or one that is blank.
    """
    try:
        with open_regular(path, _MAX_BYTES) as (file, num_bytes):
            data = file.read(num_bytes)
        lines = data.decode().split("\n")
    except ArtifactError as error:
        raise VectorError(str(error)) from error
    except UnicodeDecodeError as error:
        raise VectorError(f"{path.name}: not UTF-8 text (at byte {error.start})") from error
    if lines[-1] == "":
        del lines[-1]
    texts = tuple(line.removesuffix("\r") for line in lines)
    if not texts:
        raise VectorError(f"{path.name}: there are no texts; one per line is accepted")
    blank = next((number for number, text in enumerate(texts, 1) if not text.strip()), None)
    if blank is not None:
        raise VectorError(f"{path.name}: line {blank} is blank; a text in every line is accepted")
    return TextSet(path.name, f"sha256:{hashlib.sha256(data).hexdigest()}", texts)


@dataclass(frozen=True, eq=False)
class MeanDifference:
    """``vector`` (d,) on the CPU, and ``state_norm``, the mean |h| of both sets. Filled by :func:`mean_difference`."""

    vector: torch.Tensor
    state_norm: float


def check_disjoint(positive: TextSet, negative: TextSet) -> None:
    """Raises :class:`VectorError` where a text is in both sets."""
    both = next((text for text in positive.texts if text in set(negative.texts)), None)
    if both is not None:
        raise VectorError(f"{both[:80]!r} is in {positive.name} and in {negative.name}; texts of one side are accepted")


def contrast_operator(
    positive: TextSet,
    negative: TextSet,
    loaded: LoadedModel,
    *,
    layer: int,
    about: str | None = None,
    strength: float | None = None,
    progress: Progress = silent,
) -> OperatorArtifact:
    """The operator that pushes the input of block ``layer`` from the mean of ``negative`` to that of ``positive``.

    Args:
        about: what it is, in words; None means the names of the two files.
        strength: to recommend; None means the default of all operators.

    Raises:
        BuildError: the model has no such layer.
        VectorError: a text is in both sets, is refused by the tokenizer, or the means are equal.
    """
    vector = mean_difference(positive, negative, loaded, layer=layer, progress=progress).vector
    source = ContrastVector(
        norm=float(torch.linalg.vector_norm(vector.double())),
        positive=positive.described,
        negative=negative.described,
    )
    if about is None:
        about = f"mean of {source.positive.name} minus mean of {source.negative.name}"
    return vector_operator(vector, source, loaded, layer=layer, about=about, strength=strength)


def mean_difference(
    positive: TextSet, negative: TextSet, loaded: LoadedModel, *, layer: int, progress: Progress = silent
) -> MeanDifference:
    """v (d,) of the equation above, in float32, or float64 for a model in that.

    Raises as :func:`contrast_operator` does.
    """
    check_disjoint(positive, negative)
    layer = resolve_layer(layer, "residual", loaded)
    sides = [_tokenised(side, loaded) for side in (positive, negative)]
    total, done = sum(map(len, sides)), 0

    def count() -> None:
        nonlocal done
        done += 1
        progress("texts read", done, total)

    (first, first_norm), (second, second_norm) = (_mean(side, loaded, layer, count) for side in sides)
    vector = first - second
    norm = float(torch.linalg.vector_norm(vector))
    state_norm = (first_norm + second_norm) / 2
    if not norm > _CANCELLED * state_norm:
        raise VectorError(
            f"the mean hidden states of {positive.name} and {negative.name} at layer {layer} are equal (they differ "
            f"by {norm:.1e}): there is no direction between them"
        )
    return MeanDifference(vector.to(torch.promote_types(loaded.dtype, torch.float32)).cpu(), state_norm)


def check_contrast(artifact: OperatorArtifact, positive: TextSet, negative: TextSet, loaded: LoadedModel) -> float:
    """|v' - v| / |v| of a stored contrast, with v' computed anew from its texts.

    Raises:
        VectorError: the operator is no contrast, or the files are not those that it was made from.
        ReconstructionError: the vector is not what this model gives.
    """
    source = artifact.header.vector
    if not isinstance(source, ContrastVector):
        raise VectorError("the operator is no contrast, so that no texts can be compared with it")
    for what, found, expected in (("positive", positive, source.positive), ("negative", negative, source.negative)):
        if found.digest != expected.digest:
            raise VectorError(
                f"{what} file {found.name} has {found.digest}; the operator was made from {expected.name} with "
                f"{expected.digest}"
            )
    again = mean_difference(positive, negative, loaded, layer=artifact.header.layer)
    stored = artifact.anchor.double()
    difference = float(torch.linalg.vector_norm(again.vector.double() - stored))
    error = difference / float(torch.linalg.vector_norm(stored))
    # The coarser of the two dtypes decides how much rounding is accepted.
    dtype = max(artifact.header.model_dtype, dtype_name(loaded.dtype), key=RECONSTRUCTION_TOLERANCE.__getitem__)
    # Of the states' norm: a small difference of large means has a large relative rounding error.
    if not difference <= RECONSTRUCTION_TOLERANCE[dtype] * again.state_norm:
        raise ReconstructionError(f"the vector is off by {error:.1e} of what this model gives for its texts")
    return error


def _tokenised(side: TextSet, loaded: LoadedModel) -> list[Concept]:
    concepts = []
    for number, text in enumerate(side.texts, 1):
        try:
            concepts.append(concept_from_text(text, loaded))
        except ConceptError as error:
            raise VectorError(f"{side.name}: line {number}: {error}") from error
    return concepts


def _mean(
    texts: list[Concept], loaded: LoadedModel, layer: int, on_text: Callable[[], None]
) -> tuple[torch.Tensor, float]:
    """The mean (d,) float64 of the texts' hidden states, and their mean norm."""
    total = torch.zeros(loaded.hidden_size, dtype=torch.float64, device=loaded.device)
    norms = 0.0
    for text in texts:
        state = last_target(text.ids, loaded, layer=layer, profile="residual")
        total += state
        norms += float(torch.linalg.vector_norm(state))
        on_text()
    return total / len(texts), norms / len(texts)
