"""The operator artifact: one safetensors file, verified in full before anything in it is used.

Tensors: ``jacobian`` (n, d, d), or ``basis`` (d, r) and ``factors`` (n, r, d) of a low-rank one; ``anchor`` (d,),
``substitute_base`` (d,) and, for affine maps, ``offset`` (d,). The metadata holds one JSON header
(:class:`OperatorHeader`) and the digest, a sha256 over the header and every tensor. A single flipped bit anywhere is
therefore an error, and two files with the same digest are the same operator.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from operators.core.errors import ArtifactError
from operators.core.header import DTYPES, OperatorHeader, Profile

FORMAT = "steering-operator"
FORMAT_VERSION = "1"
MAX_BYTES = 8 << 30
"""Largest file that is read, in bytes: an exact operator of 32 tokens at d = 8192 in float32."""

_FOREIGN = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of zip archives (what torch.save writes) and of pickles."""


@dataclass(frozen=True, eq=False)
class OperatorArtifact:
    """One operator, whole and verified: J_i = U B_i, with U = 1 for an exact one.

    Shapes: ``factors`` (n, r, d) = B_i; ``basis`` (d, r) = U, or None for the identity, and then ``factors[i]`` is
    J_i = dh/dx_i (output, input) itself; ``anchor`` (d,) = y, for one text sum J_i x_i + c; ``substitute_base`` (d,) =
    y - J_{n-1} x_{n-1}; ``offset`` (d,) = c, or None where the model has no biases. Of several texts, each is the mean.
    """

    header: OperatorHeader
    factors: torch.Tensor
    basis: torch.Tensor | None
    anchor: torch.Tensor
    substitute_base: torch.Tensor
    offset: torch.Tensor | None
    header_json: str
    """The header as it was written and signed; other versions of the parser may print it differently."""
    digest: str

    @property
    def positions(self) -> int:
        """Number of concept tokens n."""
        return int(self.factors.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        tensors = (self.factors, self.basis, self.anchor, self.substitute_base, self.offset)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

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
) -> OperatorArtifact:
    """Checks the parts against each other and signs them; without a ``basis``, ``factors`` is J itself.

    Raises:
        ArtifactError: a shape, dtype or value does not fit the header.
    """
    tensors = _tensors(factors, basis, anchor, substitute_base, offset)
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    return _from_parts(header, header.model_dump_json(), plain)


def with_header(artifact: OperatorArtifact, **changes: object) -> OperatorArtifact:
    """The same numbers under a changed header, signed again. Raises :class:`ArtifactError` where they do not fit."""
    return make_artifact(
        artifact.header.model_copy(update=changes),
        artifact.factors,
        artifact.anchor,
        artifact.substitute_base,
        artifact.offset,
        basis=artifact.basis,
    )


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
    return from_bytes(_read_bytes(path, max_bytes), source=path.name)


def from_bytes(data: bytes, *, source: str) -> OperatorArtifact:
    """Verifies the bytes of an artifact; ``source`` names them in errors. Raises :class:`ArtifactError`."""
    try:
        tensors = load_tensors(data)
        metadata = _metadata(data)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Only now: a safetensors file begins with its header's length, and some lengths look like these.
        if data[:2] in _FOREIGN:
            raise ArtifactError(
                f"{source}: this is a pickle or zip archive; operators are safetensors files only"
            ) from error
        raise ArtifactError(f"{source}: not a whole safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"{source}: metadata format is {metadata.get('format')!r}; an operator says {FORMAT!r}")
    if metadata.get("version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{source}: format version {metadata.get('version')!r} is unknown; this build reads {FORMAT_VERSION!r}"
        )
    return assemble(metadata.get("header", ""), tensors, digest=metadata.get("digest"), source=source)


def tensors_of(artifact: OperatorArtifact) -> dict[str, torch.Tensor]:
    """The tensors of its file, by name."""
    return _tensors(artifact.factors, artifact.basis, artifact.anchor, artifact.substitute_base, artifact.offset)


def assemble(
    header_json: str, tensors: Mapping[str, torch.Tensor], *, digest: str | None, source: str
) -> OperatorArtifact:
    """Verifies the parts of an artifact against the digest that it was signed with; ``source`` names it in errors.

    Raises :class:`ArtifactError`.
    """
    try:
        header = OperatorHeader.model_validate_json(header_json, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "header"
        raise ArtifactError(f"{source}: header field {where!r}: {first['msg']}") from error
    try:
        artifact = _from_parts(header, header_json, tensors)
    except ArtifactError as error:
        raise ArtifactError(f"{source}: {error}") from error
    if digest != artifact.digest:
        raise ArtifactError(f"{source}: content is {artifact.digest}, the file says {digest!r}: it is damaged")
    return artifact


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "a symbolic link, which is not followed" if path.is_symlink() else error.strerror
        raise ArtifactError(f"{path.name}: cannot be opened: {reason}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{path.name}: not a regular file")
        if status.st_size > max_bytes:
            raise ArtifactError(f"{path.name}: {status.st_size} bytes; at most {max_bytes} are read")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            # The size, not the limit: a read reserves all that it is asked for.
            return file.read(status.st_size)
    except OSError as error:
        raise ArtifactError(f"{path.name}: cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _metadata(data: bytes) -> Mapping[str, str]:
    # safetensors gives the metadata of a file on disk only; the bytes were read once, so that what is
    # verified is what is used. Its own loader has already checked the length and the JSON.
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return dict(metadata)


def _tensors(
    factors: torch.Tensor,
    basis: torch.Tensor | None,
    anchor: torch.Tensor,
    substitute_base: torch.Tensor,
    offset: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    operator = {"jacobian": factors} if basis is None else {"basis": basis, "factors": factors}
    tensors = {**operator, "anchor": anchor, "substitute_base": substitute_base}
    return tensors if offset is None else {**tensors, "offset": offset}


def _expected(header: OperatorHeader) -> dict[str, tuple[int, ...]]:
    n, d = header.positions, header.hidden_size
    vectors = {"anchor": (d,), "substitute_base": (d,), "offset": (d,)}
    if header.low_rank is None:
        return {"jacobian": (n, d, d), **vectors}
    return {"basis": (d, header.low_rank.rank), "factors": (n, header.low_rank.rank, d), **vectors}


def _from_parts(header: OperatorHeader, header_json: str, tensors: Mapping[str, torch.Tensor]) -> OperatorArtifact:
    expected = _expected(header)
    unknown = sorted(set(tensors) - set(expected))
    missing = sorted(set(expected) - set(tensors) - {"offset"})
    if unknown or missing:
        raise ArtifactError(f"tensors missing: {missing}, unknown: {unknown}; accepted: {sorted(expected)}")
    if header.low_rank is not None and len(header.low_rank.residuals) != header.positions:
        raise ArtifactError(
            f"header field 'low_rank.residuals' has {len(header.low_rank.residuals)} values for "
            f"{header.positions} positions"
        )
    if header.low_rank is not None and header.low_rank.rank > header.hidden_size:
        raise ArtifactError(f"rank {header.low_rank.rank} is above the hidden size {header.hidden_size}")
    for name, shape in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ArtifactError(f"tensor {name!r} has shape {tuple(tensor.shape)}; the header asks for {shape}")
        if tensor.dtype != DTYPES[header.dtype]:
            raise ArtifactError(f"tensor {name!r} is {tensor.dtype}; the header says {header.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"tensor {name!r} has values that are not finite")
    if header.layer > header.num_layers or header.injection_layer != injection_layer(header.profile, header.layer):
        raise ArtifactError(
            f"layer {header.layer} with injection layer {header.injection_layer} is not a {header.profile!r} "
            f"operator of a model with {header.num_layers} layers"
        )
    if header.injection_layer >= header.num_layers:
        raise ArtifactError(f"injection layer {header.injection_layer} of {header.num_layers} layers")
    return OperatorArtifact(
        header=header,
        factors=tensors["jacobian" if header.low_rank is None else "factors"],
        basis=tensors.get("basis"),
        anchor=tensors["anchor"],
        substitute_base=tensors["substitute_base"],
        offset=tensors.get("offset"),
        header_json=header_json,
        digest=_digest(header_json, tensors),
    )


def injection_layer(profile: Profile, layer: int) -> int:
    """The decoder layer whose input an operator of this profile and target layer is added to.

    ``golden`` follows the published code, which pushes the input of block s-1 with a map that ends behind it.
    """
    return layer - 1 if profile == "golden" else layer


def _digest(header_json: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(f"{FORMAT}/{FORMAT_VERSION}\n{header_json}\n".encode())
    for name in sorted(tensors):
        # Flat: a tensor with an axis of length 1 may be contiguous with strides that cannot be viewed as bytes.
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
