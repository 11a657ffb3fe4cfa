"""Arrays in safetensors and npz files. No pickle is ever read, and sizes are checked before anything is allocated."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from operators.core.errors import VectorError

_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_MAX_DIRECTORY = 1 << 20
"""Bytes of a zip archive's list of members."""
_MAX_UNPACKED = 256 << 20
"""Bytes of all arrays of an archive together: a small one may claim to unpack to any size."""
_END, _END_64 = b"PK\x05\x06", b"PK\x06\x07"
ACCEPTED = "GGUF control vectors, safetensors and npz files are accepted"
_FLOATS = {2: torch.float32, 4: torch.float32, 8: torch.float64}
"""Bytes of a number in an npz file -> the dtype that holds it exactly."""


def parse_safetensors(data: bytes, *, source: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by name; float16 as float32, which holds it exactly.

    Raises:
        VectorError: it is not a whole safetensors file.
    """
    try:
        tensors = load_safetensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        if data[:2] in _PICKLES:
            raise VectorError(f"{source}: this is a pickle, which is never read; {ACCEPTED}") from error
        raise VectorError(f"{source}: not a whole safetensors file ({error}); {ACCEPTED}") from error
    return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}


def parse_npz(data: bytes, *, source: str) -> dict[str, torch.Tensor]:
    """The arrays of an npz file, by name: of floating-point numbers, float16 as float32, which holds it exactly.

    Raises:
        VectorError: it is not a whole zip archive of such arrays; the first member that is none is named. Arrays of
            objects are pickles, and refused.
    """
    _check_directory(data, source)
    arrays: dict[str, torch.Tensor] = {}
    room = _MAX_UNPACKED
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name == member.filename:
                    raise VectorError(
                        f"{source}: member {name[:80]!r} is no .npy array (torch.save archives hold pickles, which are "
                        f"never read); {ACCEPTED}"
                    )
                if name in arrays:
                    raise VectorError(f"{source}: array {name!r} is there twice")
                with archive.open(member) as file:
                    arrays[name] = _read_array(file, min(member.file_size, room), f"{source}: array {name[:80]!r}")
                room -= member.file_size
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, OSError, zlib.error) as error:
        raise VectorError(f"{source}: not a whole npz file ({error})") from error
    return arrays


def _check_directory(data: bytes, source: str) -> None:
    # zipfile makes an object for each member before any can be counted.
    end = data.rfind(_END)
    if end < 0 or end + 16 > len(data):
        raise VectorError(f"{source}: not a whole npz file (its list of members is missing: truncated)")
    size = int.from_bytes(data[end + 12 : end + 16], "little")
    if data[max(end - 20, 0) : end].startswith(_END_64):
        raise VectorError(f"{source}: a zip64 archive, as torch.save writes them to hold pickles; {ACCEPTED}")
    if size > _MAX_DIRECTORY:
        raise VectorError(f"{source}: its list of members takes {size} bytes; at most {_MAX_DIRECTORY} are read")


def _read_array(file: Any, max_bytes: int, subject: str) -> torch.Tensor:
    """One member, whose numbers take at most ``max_bytes``."""
    version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
    if version not in ((1, 0), (2, 0)):
        raise VectorError(f"{subject} has format version {version}; 1.0 and 2.0 are accepted")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)  # type: ignore[no-untyped-call]
    if dtype.hasobject:
        raise VectorError(f"{subject} is of objects, which are pickles and never read")
    if dtype.kind != "f" or dtype.itemsize not in _FLOATS:
        raise VectorError(f"{subject} is of {dtype}; float16, float32 and float64 are accepted")
    size = math.prod(shape) * dtype.itemsize
    if size > max_bytes:
        raise VectorError(f"{subject} of shape {shape} takes {size} bytes; at most {max(max_bytes, 0)} are read of it")
    content = file.read(size)
    if len(content) != size or file.read(1):
        raise VectorError(f"{subject} of shape {shape} has {len(content)} bytes, not {size}: damaged")
    # Only vectors are taken, for which the order of axes makes no difference.
    numbers = np.frombuffer(content, dtype).reshape(shape)
    return torch.from_numpy(numbers.astype(np.float64)).to(_FLOATS[dtype.itemsize])
