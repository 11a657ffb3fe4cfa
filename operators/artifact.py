"""The operator artifact: one safetensors file, verified in full before anything in it is used.

Tensors: ``jacobian`` (n, d, d), ``anchor`` (d,), ``substitute_base`` (d,) and, for affine maps, ``offset``
(d,). The metadata holds one JSON header (:class:`OperatorHeader`) and the digest, a sha256 over the header and
every tensor. A single flipped bit anywhere is therefore an error, and two files with the same digest are the
same operator.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from operators.errors import ArtifactError

FORMAT = "steering-operator"
FORMAT_VERSION = "1"
MAX_BYTES = 8 << 30
"""Largest file that is read, in bytes: an exact operator of 16 tokens at d = 8192 in float32."""

_FOREIGN = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of zip archives (what torch.save writes) and of pickles."""

Profile = Literal["golden", "residual"]
Rule = Literal["cumulative", "substitute"]
DTypeName = Literal["float32", "float64", "bfloat16"]
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
}

_Fingerprint = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=1, lt=1 << 31)]
_Word = Annotated[str, Field(max_length=1024)]
_MAX_CONCEPT = 1 << 16
"""Characters, and tokens: a bound for everything that a listing of operators sends over a wire."""


class Recommended(BaseModel):
    """Values that a request gets when it names none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    strength: float = 0.5
    rule: Rule = "cumulative"
    blend: float = Field(default=0.0, ge=0.0, le=1.0)


class OperatorHeader(BaseModel):
    """Everything about an operator but its numbers. Filled by :mod:`operators.build`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    concept: Annotated[str, Field(max_length=_MAX_CONCEPT)]
    concept_ids: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = Field(min_length=1, max_length=_MAX_CONCEPT)
    model: _Word
    architecture: _Word
    model_fingerprint: _Fingerprint
    tokenizer_fingerprint: _Fingerprint
    profile: Profile
    rule_set: _Word
    layer: _Count
    injection_layer: Annotated[int, Field(ge=0)]
    num_layers: _Count
    hidden_size: _Count
    dtype: DTypeName
    embedding: Literal["block-input"] = "block-input"
    """x_i is what the first block receives: after any scaling of the embedding table."""
    recommended: Recommended
    reconstruction_error: Annotated[float, Field(ge=0.0)]
    builder_version: _Word
    created: AwareDatetime

    @field_validator("created")
    @classmethod
    def _created_is_in_range(cls, created: datetime) -> datetime:
        if not 1970 < created.year < 9999:
            raise ValueError(f"{created} is no time at which an operator was built")
        return created


@dataclass(frozen=True, eq=False)
class OperatorArtifact:
    """One operator, whole and verified.

    Shapes: ``jacobian`` (n, d, d) with ``jacobian[i] = dh/dx_i`` (output, input); ``anchor`` (d,) = y =
    sum J_i x_i + c; ``substitute_base`` (d,) = y - J_{n-1} x_{n-1}; ``offset`` (d,) = c, or None where the model
    has no biases.
    """

    header: OperatorHeader
    jacobian: torch.Tensor
    anchor: torch.Tensor
    substitute_base: torch.Tensor
    offset: torch.Tensor | None
    header_json: str
    """The header as it was written and signed; other versions of the parser may print it differently."""
    digest: str

    @property
    def positions(self) -> int:
        """Number of concept tokens n."""
        return int(self.jacobian.shape[0])


def make_artifact(
    header: OperatorHeader,
    jacobian: torch.Tensor,
    anchor: torch.Tensor,
    substitute_base: torch.Tensor,
    offset: torch.Tensor | None = None,
) -> OperatorArtifact:
    """Checks the parts against each other and signs them.

    Raises:
        ArtifactError: a shape, dtype or value does not fit the header.
    """
    tensors = {"jacobian": jacobian, "anchor": anchor, "substitute_base": substitute_base}
    if offset is not None:
        tensors["offset"] = offset
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    return _from_parts(header, header.model_dump_json(), plain)


def to_bytes(artifact: OperatorArtifact) -> bytes:
    """The file of this artifact. Equal artifacts give equal bytes."""
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "digest": artifact.digest,
        "header": artifact.header_json,
    }
    # safetensors writes the metadata in random order; sorting it makes the bytes a function of the artifact.
    saved = save_tensors(_tensors(artifact), metadata=metadata)
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
    header_json = metadata.get("header", "")
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
    if metadata.get("digest") != artifact.digest:
        raise ArtifactError(
            f"{source}: content is {artifact.digest}, the file says {metadata.get('digest')!r}: it is damaged"
        )
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


def _tensors(artifact: OperatorArtifact) -> dict[str, torch.Tensor]:
    tensors = {
        "jacobian": artifact.jacobian,
        "anchor": artifact.anchor,
        "substitute_base": artifact.substitute_base,
    }
    if artifact.offset is not None:
        tensors["offset"] = artifact.offset
    return tensors


def _from_parts(header: OperatorHeader, header_json: str, tensors: Mapping[str, torch.Tensor]) -> OperatorArtifact:
    n, d = len(header.concept_ids), header.hidden_size
    expected = {"jacobian": (n, d, d), "anchor": (d,), "substitute_base": (d,)}
    unknown = sorted(set(tensors) - {*expected, "offset"})
    missing = sorted(set(expected) - set(tensors))
    if unknown or missing:
        raise ArtifactError(f"tensors missing: {missing}, unknown: {unknown}; accepted: {sorted(expected)}, offset")
    if "offset" in tensors:
        expected["offset"] = (d,)
    for name, shape in expected.items():
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
        jacobian=tensors["jacobian"],
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
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
