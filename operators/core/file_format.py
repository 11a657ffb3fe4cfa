"""An operator's file without its numbers: everything that can be checked before a tensor is read. Needs no torch.

The file is a safetensors file: the length of a JSON header (8 bytes, little endian), that header, and the bytes of the
tensors without gaps. Tensors: ``jacobian`` (n, d, d), or ``basis`` (d, r) and ``factors`` (n, r, d) of a low-rank
operator; ``anchor`` (d,), ``substitute_base`` (d,), for affine maps ``offset`` (d,), and ``neutral`` (d,) where the
header names neutral texts, as it does in all that is built since there are any. Of a vector: ``anchor``. Of a lens:
``pull`` (d, d) and ``vocabulary_mean`` (d,). The safetensors metadata holds format and version, the operator's own
header as JSON (:class:`OperatorHeader`), and the digest, a sha256 over that header and every tensor, which
:func:`operators.core.artifact.read_artifact` verifies.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from operators.core.errors import ArtifactError
from operators.core.header import OperatorHeader, injection_layer

FORMAT = "steering-operator"
FORMAT_VERSION = "1"
MAX_BYTES = 8 << 30
"""Largest file that is read, in bytes: an exact operator of 32 tokens at d = 8192 in float32."""
MAX_JSON_BYTES = 100_000_000
"""Largest JSON header that is read: the limit of safetensors itself."""
_MAX_STRUCTURE = 1 << 16
"""Bytes of the JSON header outside of its strings: a few hundred in a real file. Bounds what parsing it allocates."""
# In two steps, so that no match is ever tried a second way: the time is linear in the length whatever a file holds.
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"')
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

_FOREIGN = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of zip archives (what torch.save writes) and of pickles."""

_DTYPES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "F64": ("float64", 8),
        "F32": ("float32", 4),
        "F16": ("float16", 2),
        "BF16": ("bfloat16", 2),
        "I64": ("int64", 8),
        "I32": ("int32", 4),
        "I16": ("int16", 2),
        "I8": ("int8", 1),
        "U64": ("uint64", 8),
        "U32": ("uint32", 4),
        "U16": ("uint16", 2),
        "U8": ("uint8", 1),
        "C64": ("complex64", 8),
        "BOOL": ("bool", 1),
        "F8_E4M3": ("float8_e4m3fn", 1),
        "F8_E5M2": ("float8_e5m2", 1),
    }
)
"""Name in a safetensors file -> name in torch, and bytes of a number."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor without its numbers; ``dtype`` by its name in torch. Filled from a file, or from tensors in memory."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FileHeader:
    """What an operator's file says about itself, checked against its layout. Filled by :func:`parse_file_header`."""

    header: OperatorHeader
    header_json: str
    """The header as it was written and signed; other versions of the parser may print it differently."""
    digest: str
    """As the file states it. Whether the tensors have it is known only after reading them."""
    affine: bool
    """Whether the file has the tensor ``offset``."""
    num_bytes: int
    """Size of the file."""


def read_file_header(path: Path, *, max_bytes: int = MAX_BYTES) -> FileHeader:
    """Reads what an operator's file says about itself, and no tensor: flipped bits in a tensor are not found.

    Raises:
        ArtifactError: as :func:`operators.core.artifact.read_artifact` does, except for what only the tensors'
            bytes tell: values that are not finite, and a digest that they do not have.
    """
    with open_regular(path, max_bytes) as (file, num_bytes):
        return parse_file_header(file, num_bytes, source=path.name)


@contextmanager
def open_regular(path: Path, max_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a regular file of at most ``max_bytes`` without following a symbolic link; yields it and its size.

    Raises :class:`ArtifactError` for anything else, and where the body of the ``with`` block cannot read the file.
    """
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
            yield file, status.st_size
    except OSError as error:
        raise ArtifactError(f"{path.name}: cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def parse_file_header(file: BinaryIO, num_bytes: int, *, source: str) -> FileHeader:
    """Reads and checks the beginning of ``file``, which has ``num_bytes``; ``source`` names it in errors.

    Raises :class:`ArtifactError`.
    """
    first = file.read(8)
    try:
        text = _read_json(file, first, num_bytes)
        entries = json.loads(text.decode(), object_pairs_hook=_without_duplicates, parse_int=_non_negative)
        metadata = _metadata(entries.pop("__metadata__", None))
        tensors = _tensor_infos(entries, num_bytes - len(first) - len(text))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        # Only now: a safetensors file begins with its header's length, and some lengths look like these.
        if first[:2] in _FOREIGN:
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
    header_json, digest = metadata.get("header", ""), metadata.get("digest")
    header = parse_header(header_json, source=source)
    try:
        check_layout(header, tensors)
    except ArtifactError as error:
        raise ArtifactError(f"{source}: {error}") from error
    if digest is None or not _DIGEST.fullmatch(digest):
        raise ArtifactError(f"{source}: the file says {digest!r}, which is no sha256 digest: it is damaged")
    return FileHeader(header, header_json, digest, "offset" in tensors, num_bytes)


def parse_header(header_json: str, *, source: str) -> OperatorHeader:
    """Parses an operator's own header. Raises :class:`ArtifactError` naming the first field that is not accepted."""
    with _naming_the_field(source):
        return OperatorHeader.model_validate_json(header_json, strict=True)


def checked_header(fields: Mapping[str, object], *, source: str) -> OperatorHeader:
    """A header of these fields. Raises :class:`ArtifactError` naming the first one that is not accepted."""
    with _naming_the_field(source):
        return OperatorHeader.model_validate(fields)


def written_header(header: OperatorHeader, *, exclude: Mapping[str, Any]) -> str:
    """The JSON of a header, which reads back as the same header.

    Args:
        exclude: fields with their default values, which are not written.

    Raises:
        ArtifactError: a reader would refuse it, or read something else: a header that was changed after it was made
            holds whatever it was given.
    """
    try:
        header_json = header.model_dump_json(exclude=dict(exclude), warnings=False)
    except (PydanticSerializationError, UnicodeError) as error:
        raise ArtifactError(f"the header cannot be written: {error}") from error
    read = parse_header(header_json, source="header")
    if read != header:
        mine, theirs = dict(header), dict(read)
        field = next((name for name in mine if name not in theirs or mine[name] != theirs[name]), "extra")
        raise ArtifactError(f"header field {field!r}: it would be read as another value than it has")
    if len(json.dumps(header_json, ensure_ascii=False).encode()) > MAX_JSON_BYTES - _MAX_STRUCTURE:
        raise ArtifactError(f"the header takes {len(header_json.encode())} bytes; at most {MAX_JSON_BYTES} are read")
    return header_json


@contextmanager
def _naming_the_field(source: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "header"
        raise ArtifactError(f"{source}: header field {field!r}: {first['msg']}") from error


def check_layout(header: OperatorHeader, tensors: Mapping[str, TensorInfo]) -> None:
    """Checks names, dtypes and shapes of an operator's tensors, and its layers, against its header.

    Raises :class:`ArtifactError`.
    """
    expected = _expected_shapes(header)
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
        if tensor.shape != shape:
            raise ArtifactError(f"tensor {name!r} has shape {tensor.shape}; the header asks for {shape}")
        if tensor.dtype != header.dtype:
            raise ArtifactError(f"tensor {name!r} is torch.{tensor.dtype}; the header says {header.dtype}")
    if header.layer > header.num_layers or header.injection_layer != injection_layer(header.profile, header.layer):
        raise ArtifactError(
            f"layer {header.layer} with injection layer {header.injection_layer} is not a {header.profile!r} "
            f"operator of a model with {header.num_layers} layers"
        )
    if header.injection_layer >= header.num_layers:
        raise ArtifactError(f"injection layer {header.injection_layer} of {header.num_layers} layers")


def _expected_shapes(header: OperatorHeader) -> dict[str, tuple[int, ...]]:
    n, d = header.positions, header.hidden_size
    if header.vector is not None:
        return {"anchor": (d,)}
    if header.lens is not None:
        return {"pull": (d, d), "vocabulary_mean": (d,)}
    vectors = {"anchor": (d,), "substitute_base": (d,), "offset": (d,)}
    if header.neutral is not None:
        vectors["neutral"] = (d,)
    if header.low_rank is None:
        return {"jacobian": (n, d, d), **vectors}
    return {"basis": (d, header.low_rank.rank), "factors": (n, header.low_rank.rank, d), **vectors}


def _read_json(file: BinaryIO, first: bytes, num_bytes: int) -> bytes:
    """The JSON header behind the ``first`` 8 bytes. Raises ValueError where it is too long or no plain JSON object."""
    if len(first) < 8:
        raise ValueError(f"it has {num_bytes} bytes; the length of its header alone takes 8")
    length = int.from_bytes(first, "little")
    if length > num_bytes - 8:
        raise ValueError(f"its header would take {length} bytes; {num_bytes - 8} follow its length")
    if length > MAX_JSON_BYTES:
        raise ValueError(f"its header takes {length} bytes; at most {MAX_JSON_BYTES} are read")
    text = file.read(length)
    if len(text) < length or not text.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    # No JSON has a backslash outside of a string: what follows one is never parsed, however it is read here.
    unescaped = _ESCAPE.sub(b"", text)
    if unescaped.count(b'"') % 2:
        raise ValueError("its header has a string that does not end")
    structure = _STRING.sub(b"", unescaped)
    if len(structure) > _MAX_STRUCTURE:
        raise ValueError("its header has more entries than an operator's")
    if any(other in structure for other in b"\t\n\r"):
        # Nothing of a file is left out of its check, be it a byte that means the same as another.
        raise ValueError("its header has white space other than spaces")
    return text


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header has a name twice")
    return found


def _non_negative(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"its header has the number {digits}; none of a safetensors file is negative")
    return int(digits)


def _metadata(entry: Any) -> dict[str, str]:
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError("its metadata is no object of texts")
    for text in (*entry, *entry.values()):
        # JSON escapes can write half a character, which UTF-8 cannot.
        text.encode()
    return entry


def _tensor_infos(entries: Mapping[str, Any], num_bytes: int) -> dict[str, TensorInfo]:
    """The tensors, after checking that their bytes fill the ``num_bytes`` behind the header, one after another."""
    tensors, spans = {}, []
    for name, entry in entries.items():
        dtype, size = _DTYPES[entry["dtype"]]
        shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
        # A truth value is an integer in Python, and not in a shape.
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ValueError("a shape or an offset is not a whole number")
        if end - start != size * math.prod(shape):
            raise ValueError("a tensor's shape does not fit its bytes")
        tensors[name] = TensorInfo(dtype, shape)
        spans.append((start, end))
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise ValueError("its tensors overlap, or leave a gap")
        position = end
    if position != num_bytes:
        raise ValueError(f"its tensors take {position} bytes; {num_bytes} follow its header")
    return tensors
