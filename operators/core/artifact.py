"""The operator artifact: one safetensors file, verified in full before anything in it is used.

The layout is that of :mod:`operators.core.file_format`. The digest is a sha256 over the operator's header and every
tensor: a single flipped bit anywhere is an error, and two files with the same digest are the same operator.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from operators.core.errors import ArtifactError
from operators.core.file_format import (
    FORMAT,
    FORMAT_VERSION,
    MAX_BYTES,
    MAX_JSON_BYTES,
    TensorInfo,
    check_layout,
    checked_header,
    open_regular,
    parse_file_header,
    parse_header,
    written_header,
)
from operators.core.header import OperatorHeader

_LATER = ("vector", "lens", "neutral", "attention", "concept_tokens")
"""Fields of a header that came after the first version."""


@dataclass(frozen=True, eq=False)
class Lens:
    """The tensors of a lens: v_w = pull (W_U[w] - vocabulary_mean) is the push along a word w."""

    pull: torch.Tensor
    """(d, d) = J^T, from the output of the final norm back to the input of the lens's block."""
    vocabulary_mean: torch.Tensor
    """(d,), the mean of the rows of the unembedding W_U."""


@dataclass(frozen=True, eq=False)
class OperatorArtifact:
    """One operator, whole and verified: J_i = U B_i, with U = 1 for an exact one.

    Shapes: ``factors`` (n, r, d) = B_i; ``basis`` (d, r) = U, or None for the identity, and then ``factors[i]`` is
    J_i = dh/dx_i (output, input) itself; ``anchor`` (d,) = y, for one text sum J_i x_i + c; ``substitute_base`` (d,) =
    y - J_{n-1} x_{n-1}; ``offset`` (d,) = c, or None where the model has no biases. Of several texts, each is the mean.
    ``neutral`` (d,) is the mean over neutral texts of what y is of the concept's, times the sum of the texts' shares (1
    but in a mixture), so that y - neutral is the contrast anchor; None where the header names no neutral texts.
    A vector has no blocks: ``anchor`` (d,) is the vector, ``factors`` (0, 0, d) and ``substitute_base`` (0,) are empty.
    A lens has neither blocks nor an anchor, and the only one with a ``lens``.
    """

    header: OperatorHeader
    factors: torch.Tensor
    basis: torch.Tensor | None
    anchor: torch.Tensor
    substitute_base: torch.Tensor
    offset: torch.Tensor | None
    neutral: torch.Tensor | None
    header_json: str
    """The header as it was written and signed; other versions of the parser may print it differently."""
    digest: str
    lens: Lens | None = None

    @property
    def positions(self) -> int:
        """Number of concept tokens n; 0 for a vector or a lens."""
        return int(self.factors.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return sum(tensor.nbytes for tensor in tensors_of(self).values())

    def jacobian(self) -> torch.Tensor:
        """J (n, d, d), made anew for a low-rank operator."""
        return self.factors if self.basis is None else self.basis @ self.factors


def make_artifact(
    header: OperatorHeader,
    factors: torch.Tensor,
    anchor: torch.Tensor,
    substitute_base: torch.Tensor,
    offset: torch.Tensor | None = None,
    *,
    basis: torch.Tensor | None = None,
    neutral: torch.Tensor | None = None,
) -> OperatorArtifact:
    """Checks the parts against each other and signs them; without a ``basis``, ``factors`` is J itself.

    Raises:
        ArtifactError: a shape, dtype or value does not fit the header.
    """
    return _signed(header, _tensors(factors, basis, anchor, substitute_base, offset, neutral))


def make_vector(header: OperatorHeader, vector: torch.Tensor) -> OperatorArtifact:
    """The operator of rank 0 whose anchor is ``vector`` (d,), checked and signed.

    Raises:
        ArtifactError: the shape, the dtype or a value does not fit the header.
    """
    return _signed(header, {"anchor": vector})


def make_lens(header: OperatorHeader, lens: Lens) -> OperatorArtifact:
    """The artifact of a lens, checked and signed.

    Raises:
        ArtifactError: a shape, dtype or value does not fit the header.
    """
    return _signed(header, {"pull": lens.pull, "vocabulary_mean": lens.vocabulary_mean})


def with_header(artifact: OperatorArtifact, **changes: object) -> OperatorArtifact:
    """The same numbers under a changed header, signed again.

    Raises :class:`ArtifactError` where a field is unknown or not accepted, or the numbers do not fit.
    """
    return _signed(checked_header({**dict(artifact.header), **changes}, source="header"), tensors_of(artifact))


def to_bytes(artifact: OperatorArtifact) -> bytes:
    """The file of this artifact. Equal artifacts give equal bytes."""
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "digest": artifact.digest,
        "header": artifact.header_json,
    }
    # safetensors writes the metadata in random order; sorting it makes the bytes a function of the artifact.
    saved = save_tensors(tensors_of(artifact), metadata=metadata)
    start = 8 + int.from_bytes(saved[:8], "little")
    head = json.dumps(json.loads(saved[8:start]), sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, memoryview(saved)[start:]])


def read_artifact(path: Path, *, max_bytes: int = MAX_BYTES) -> OperatorArtifact:
    """Reads and verifies one artifact.

    The file is opened without following a symbolic link, and nothing of it is ever unpickled.

    Raises:
        ArtifactError: says what does not fit: missing, not a regular file, too large, truncated, trailing
            bytes, not safetensors, unknown version, damaged header, wrong shape, NaN, wrong digest.
    """
    with open_regular(path, max_bytes) as (file, num_bytes):
        # Once, so that what is verified is what is used. The size, not the limit: read(n) allocates n.
        data = file.read(num_bytes)
    return from_bytes(data, source=path.name)


def from_bytes(data: bytes, *, source: str) -> OperatorArtifact:
    """Verifies the bytes of an artifact; ``source`` names them in errors. Raises :class:`ArtifactError`."""
    stated = parse_file_header(io.BytesIO(data), len(data), source=source)
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{source}: not a whole safetensors file ({error})") from error
    return _verified(stated.header, stated.header_json, tensors, digest=stated.digest, source=source)


def tensors_of(artifact: OperatorArtifact) -> dict[str, torch.Tensor]:
    """The tensors of its file, by name."""
    if artifact.header.vector is not None:
        return {"anchor": artifact.anchor}
    if artifact.lens is not None:
        return {"pull": artifact.lens.pull, "vocabulary_mean": artifact.lens.vocabulary_mean}
    return _tensors(
        artifact.factors,
        artifact.basis,
        artifact.anchor,
        artifact.substitute_base,
        artifact.offset,
        artifact.neutral,
    )


def assemble(
    header_json: str, tensors: Mapping[str, torch.Tensor], *, digest: str | None, source: str
) -> OperatorArtifact:
    """Verifies the parts of an artifact against the digest that it was signed with; ``source`` names it in errors.

    Raises :class:`ArtifactError`.
    """
    header = parse_header(header_json, source=source)
    return _verified(header, header_json, tensors, digest=digest, source=source)


def _verified(
    header: OperatorHeader,
    header_json: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    digest: str | None,
    source: str,
) -> OperatorArtifact:
    try:
        artifact = _from_parts(header, header_json, tensors)
    except ArtifactError as error:
        raise ArtifactError(f"{source}: {error}") from error
    if digest != artifact.digest:
        raise ArtifactError(f"{source}: content is {artifact.digest}, the file says {digest!r}: it is damaged")
    return artifact


def _tensors(
    factors: torch.Tensor,
    basis: torch.Tensor | None,
    anchor: torch.Tensor,
    substitute_base: torch.Tensor,
    offset: torch.Tensor | None,
    neutral: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    operator = {"jacobian": factors} if basis is None else {"basis": basis, "factors": factors}
    tensors = {**operator, "anchor": anchor, "substitute_base": substitute_base}
    optional = {"offset": offset, "neutral": neutral}
    return tensors | {name: tensor for name, tensor in optional.items() if tensor is not None}


def _signed(header: OperatorHeader, tensors: Mapping[str, torch.Tensor]) -> OperatorArtifact:
    header_json = written_header(header, exclude=_unknown_to_earlier_versions(header))
    artifact = _from_parts(
        header, header_json, {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    )
    if artifact.nbytes > MAX_BYTES - MAX_JSON_BYTES:
        raise ArtifactError(f"its numbers take {artifact.nbytes} bytes; a file of at most {MAX_BYTES} is read")
    return artifact


def _unknown_to_earlier_versions(header: OperatorHeader) -> dict[str, Any]:
    """Earlier versions read strictly: what does without a field that they do not know is written as they write it."""
    absent: dict[str, Any] = {name: True for name in _LATER if getattr(header, name) is None}
    settings = {name for name, default in _EARLIER.items() if getattr(header.recommended, name) == default}
    if header.neutral is None and settings == set(_EARLIER):
        absent["recommended"] = settings
    return absent


_EARLIER = MappingProxyType({"anchor": "concept", "first_token": "operator"})
"""What earlier versions mean, which know no other."""


def _from_parts(header: OperatorHeader, header_json: str, tensors: Mapping[str, torch.Tensor]) -> OperatorArtifact:
    check_layout(header, {name: _info(tensor) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"tensor {name!r} has values that are not finite")
    lens = None
    if header.lens is not None:
        lens = Lens(tensors["pull"], tensors["vocabulary_mean"])
    # A lens has no anchor.
    anchor = tensors.get("anchor", torch.empty(0))
    if header.vector is not None or lens is not None:
        factors, substitute_base = anchor.new_empty(0, 0, header.hidden_size), anchor.new_empty(0)
    else:
        factors = tensors["jacobian" if header.low_rank is None else "factors"]
        substitute_base = tensors["substitute_base"]
    return OperatorArtifact(
        header=header,
        factors=factors,
        basis=tensors.get("basis"),
        anchor=anchor,
        substitute_base=substitute_base,
        offset=tensors.get("offset"),
        neutral=tensors.get("neutral"),
        header_json=header_json,
        digest=_digest(header_json, tensors),
        lens=lens,
    )


def _info(tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _digest(header_json: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(f"{FORMAT}/{FORMAT_VERSION}\n{header_json}\n".encode())
    for name in sorted(tensors):
        # Flat: a tensor with an axis of length 1 may be contiguous with strides that cannot be viewed as bytes.
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
