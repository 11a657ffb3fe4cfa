"""Control vectors in GGUF files, as repeng and llama.cpp write and read them.

Tensors ``direction.N`` (d,), float32: the vector that is added to the output of block N (blocks count from 0), which is
the input of block N + 1. The file is read by an own parser, because it comes from elsewhere: every count in it is
checked against its size before anything is allocated.
"""

from __future__ import annotations

import os
import re
import secrets
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from operators.core.errors import VectorError
from operators.core.vector_source import MAX_WORD

ARCHITECTURE = "controlvector"
MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_ENTRIES = 4096
"""Of metadata, of tensors, and of strings in an array of them: a control vector has a few, and a tensor per block."""
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY, _FLOAT32 = 8, 9, 0
_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")


@dataclass(frozen=True, eq=False)
class ControlVector:
    """``directions``: by block, the vector (d,) float32 that is added to its output. Filled from a file."""

    model_hint: str
    directions: Mapping[int, NDArray[np.float32]]


def parse_control_vector(data: bytes, *, source: str) -> ControlVector:
    """Reads a whole file. ``source`` names it in errors.

    Raises:
        VectorError: not a whole GGUF file, or not one of a control vector; names what is wrong.
    """
    reader = _Reader(data, source)
    version = reader.header()
    if version not in _VERSIONS:
        raise VectorError(f"{source}: GGUF version {version}; versions 2 and 3, little endian, are accepted")
    num_tensors, num_entries = reader.count("tensors"), reader.count("metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = reader.string()
        if key in metadata:
            raise VectorError(f"{source}: metadata {key[:80]!r} is there twice")
        metadata[key] = reader.value(reader.scalar("<I"))
    architecture, hint = metadata.get("general.architecture"), metadata.get(f"{ARCHITECTURE}.model_hint")
    if architecture != ARCHITECTURE:
        raise VectorError(f"{source}: general.architecture is {repr(architecture)[:80]}; {ARCHITECTURE!r} is accepted")
    if not isinstance(hint, str) or len(hint) > MAX_WORD:
        raise VectorError(f"{source}: {ARCHITECTURE}.model_hint is {repr(hint)[:80]}; the kind of model is needed")
    infos = [_tensor_info(reader) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16:
        raise VectorError(f"{source}: general.alignment is {alignment!r}; 1 to 65536 are accepted")
    start = -(-reader.position // alignment) * alignment
    directions: dict[int, NDArray[np.float32]] = {}
    for block, width, offset in infos:
        if block in directions:
            raise VectorError(f"{source}: tensor direction.{block} is there twice")
        if start + offset + 4 * width > len(data):
            raise VectorError(f"{source}: tensor direction.{block} ends behind the file's {len(data)} bytes: truncated")
        directions[block] = np.frombuffer(data, "<f4", width, start + offset)
    if not directions:
        raise VectorError(f"{source}: there is no tensor direction.N in it")
    return ControlVector(hint, dict(sorted(directions.items())))


def write_control_vector(path: Path, vector: ControlVector) -> None:
    """Writes the file whole or not at all; replaces one of that name.

    Raises:
        VectorError: it cannot be written.
    """
    from gguf import GGUFWriter

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", vector.model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vector.directions))
        for block, direction in vector.directions.items():
            writer.add_tensor(f"direction.{block}", np.ascontiguousarray(direction, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    except OSError as error:
        raise VectorError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def _tensor_info(reader: _Reader) -> tuple[int, int, int]:
    """Block, width and offset of the next tensor. Raises :class:`VectorError` for one that is no direction."""
    name = reader.string()
    found = _DIRECTION.fullmatch(name)
    if found is None:
        raise VectorError(f"{reader.source}: tensor {name[:80]!r}; a control vector has tensors direction.N alone")
    dimensions = reader.scalar("<I")
    if dimensions != 1:
        raise VectorError(f"{reader.source}: tensor {name!r} has {dimensions} dimensions; 1 is accepted")
    width, kind, offset = reader.scalar("<Q"), reader.scalar("<I"), reader.scalar("<Q")
    if kind != _FLOAT32:
        raise VectorError(f"{reader.source}: tensor {name!r} is of GGUF type {kind}; 0 (float32) is accepted")
    if width < 1:
        raise VectorError(f"{reader.source}: tensor {name!r} has no numbers")
    return int(found[1]), width, offset


class _Reader:
    """Reads values one after another; whatever ends behind the file is an error."""

    def __init__(self, data: bytes, source: str) -> None:
        self._data, self.source, self.position = data, source, 0

    def header(self) -> int:
        """The version, after the file's first four bytes."""
        if self._take(len(MAGIC)) != MAGIC:
            raise VectorError(f"{self.source}: not a GGUF file")
        return int(self.scalar("<I"))

    def scalar(self, layout: str) -> Any:
        """One number."""
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def count(self, what: str) -> int:
        """How many of something there are."""
        number = int(self.scalar("<Q"))
        if number > _MAX_ENTRIES:
            raise VectorError(f"{self.source}: {number} {what}; at most {_MAX_ENTRIES} are accepted")
        return number

    def string(self) -> str:
        """A text of UTF-8."""
        try:
            return self._take(self.scalar("<Q")).decode()
        except UnicodeDecodeError as error:
            raise VectorError(f"{self.source}: a text in it is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """A metadata value. What is in an array is passed over: no metadata of a control vector is one."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise VectorError(f"{self.source}: metadata of GGUF type {kind}, which is none")
        of = self.scalar("<I")
        if of in _SCALARS:
            self._take(self.scalar("<Q") * struct.calcsize(_SCALARS[of]))
        elif of == _STRING:
            for _ in range(self.count("strings in an array")):
                self.string()
        else:
            raise VectorError(f"{self.source}: an array of GGUF type {of}; numbers and strings are accepted")
        return None

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self.position:
            raise VectorError(f"{self.source}: the file ends after {len(self._data)} bytes: it is truncated")
        self.position += length
        return self._data[self.position - length : self.position]
