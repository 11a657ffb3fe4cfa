"""The matrices of a lens: the mean over neutral texts of what each text pulls.

first    J = mean over texts of G_0                 G_s of :mod:`operators.lens.pulls`
others   J = mean over texts of sum_{s>=1} G_s
all      their sum
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from operators.builder.checks import RECONSTRUCTION_TOLERANCE, dtype_name
from operators.builder.concept import concept_from_text
from operators.core.capacity import format_bytes, free_memory, memory_errors_as_build_errors
from operators.core.errors import BuildError, ReconstructionError
from operators.core.lens_source import LensPositions
from operators.core.progress import Progress, silent
from operators.lens.partial import PartialSums
from operators.lens.pulls import text_pulls
from operators.model.loading import LoadedModel

MAX_TEXTS = 4096
_COPIES = 4
"""Matrices (d, d) in float64 that are alive for each layer and kind: sum, summand, and as much while they are saved."""


@dataclass(frozen=True, eq=False)
class LensMatrices:
    """J of several layers. Filled by :func:`lens_matrices`; (d, d) each, output by input, in float64 on the CPU."""

    first: Mapping[int, torch.Tensor]
    others: Mapping[int, torch.Tensor]
    texts: int
    texts_digest: str
    reconstruction_error: float
    """The worst of the texts."""

    def pull(self, positions: LensPositions, layer: int) -> torch.Tensor:
        """J^T (d, d) in float32, input by output, from one kind of positions."""
        first, others = self.first[layer], self.others[layer]
        chosen = {"first": first, "others": others, "all": first + others}[positions]
        return chosen.T.to(torch.float32).contiguous()


def texts_digest(texts: Sequence[str]) -> str:
    """sha256 of texts, joined by line feeds."""
    return f"sha256:{hashlib.sha256(chr(10).join(texts).encode()).hexdigest()}"


def encode_texts(texts: Sequence[str], loaded: LoadedModel) -> list[tuple[int, ...]]:
    """Token ids of neutral texts, as the model's tokenizer makes them, special tokens in front included.

    Raises:
        BuildError: there are none or too many, or one has no position behind its first.
        ConceptError: a text is no Unicode text, or longer than the model's context.
    """
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise BuildError(f"{len(texts)} neutral texts; 1 to {MAX_TEXTS} are accepted")
    found = [concept_from_text(text, loaded).ids for text in texts]
    for text, ids in zip(texts, found, strict=True):
        if len(ids) < 2:
            raise BuildError(f"neutral text {text[:40]!r} has {len(ids)} token; 2 or more are needed")
    return found


def check_layers(layers: Sequence[int], loaded: LoadedModel) -> None:
    """Raises :class:`BuildError` for a layer that has no input to push, or none behind it."""
    for layer in layers:
        if not 1 <= layer < loaded.num_layers:
            raise BuildError(f"layer {layer} of {loaded.name}; 1 to {loaded.num_layers - 1} are accepted for a lens")


@memory_errors_as_build_errors()
def lens_matrices(
    texts: Sequence[str],
    layers: Sequence[int],
    loaded: LoadedModel,
    *,
    partial: PartialSums | None = None,
    progress: Progress = silent,
) -> LensMatrices:
    """The matrices at each of the layers, from 1 to L-1, all of their rows.

    Args:
        partial: where sums are kept after each text, and taken up again; the caller removes them.
        progress: receives the rows done and how many there are.

    Raises:
        BuildError: a layer does not exist, a text has one token, or there is too little memory.
        ReconstructionError: a text's matrices do not give the model's outputs back.
        UnsupportedModelError: the architecture has no detach table.
    """
    check_layers(layers, loaded)
    d, encoded = loaded.hidden_size, encode_texts(texts, loaded)
    need, have = 2 * len(layers) * _COPIES * 8 * d * d, free_memory(torch.device("cpu"))
    if need > have:
        raise BuildError(
            f"a lens of {len(layers)} layers at hidden size {d} takes {format_bytes(need)} of memory; "
            f"{format_bytes(have)} may be used (fewer layers need less)"
        )
    done, worst, sums = (partial.load() if partial is not None else None) or (0, 0.0, {})
    for number, ids in enumerate(encoded[done:], start=done):
        rows_before = number * d
        rows = 0

        def count(more: int, before: int = rows_before) -> None:
            nonlocal rows
            rows += more
            progress("rows", before + rows, len(encoded) * d)

        pulls, error = text_pulls(loaded.model, ids, layers, on_rows=count)
        _check(error, texts[number], loaded)
        worst = max(worst, error)
        summands = {f"{kind}.{layer}": getattr(each, kind) for layer, each in pulls.items() for kind in _KINDS}
        sums = {name: summand + sums[name] if sums else summand for name, summand in summands.items()}
        if partial is not None:
            partial.save(number + 1, worst, sums)
    means = {name: total / len(encoded) for name, total in sums.items()}
    for name, mean in means.items():
        if not bool(torch.isfinite(mean.to(torch.float32)).all()):
            raise ReconstructionError(f"the lens matrix {name} of {loaded.name} is not finite in float32")
    first, others = ({layer: means[f"{kind}.{layer}"] for layer in layers} for kind in _KINDS)
    return LensMatrices(first, others, len(encoded), texts_digest(texts), worst)


_KINDS = ("first", "others")


def _check(error: float, text: str, loaded: LoadedModel) -> None:
    # Negated, so that NaN is refused too.
    if not error <= RECONSTRUCTION_TOLERANCE[dtype_name(loaded.dtype)]:
        raise ReconstructionError(
            f"the matrices of {text[:40]!r} give the outputs of {loaded.name} back to {error:.1e} only"
        )
