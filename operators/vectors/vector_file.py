"""A file of vectors from elsewhere, in any of the formats that are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from operators.core.errors import ArtifactError, VectorError
from operators.core.file_format import open_regular
from operators.vectors.array_files import parse_npz, parse_safetensors
from operators.vectors.gguf_file import MAGIC, parse_control_vector

MAX_BYTES = 256 << 20
"""Largest file that is read: a control vector of 128 blocks at d = 16384 takes 8 MiB."""


@dataclass(frozen=True, eq=False)
class VectorFile:
    """The tensors of a file by name, before it is said which of them is wanted. Filled by :func:`read_vector_file`."""

    name: str
    file_format: Literal["gguf", "safetensors", "npz"]
    digest: str
    """sha256 of its bytes."""
    tensors: Mapping[str, torch.Tensor]
    layers: Mapping[int, str]
    """Layer whose input a vector is added to -> its tensor, where the file says so: GGUF files do."""
    model_hint: str | None
    """What a GGUF file says of its model."""


def read_vector_file(path: Path) -> VectorFile:
    """Reads a regular file of at most MAX_BYTES, once, in the format that its first bytes show.

    Raises:
        VectorError: it cannot be read, is damaged, or is of another format; names what is accepted.
    """
    try:
        with open_regular(path, MAX_BYTES) as (file, num_bytes):
            data = file.read(num_bytes)
    except ArtifactError as error:
        raise VectorError(str(error)) from error
    name, digest = path.name, f"sha256:{hashlib.sha256(data).hexdigest()}"
    if data.startswith(MAGIC):
        found = parse_control_vector(data, source=name)
        # A copy each: numpy's views of the file's bytes cannot be written to, of which torch warns.
        tensors = {f"direction.{block}": torch.tensor(vector) for block, vector in found.directions.items()}
        layers = {block + 1: f"direction.{block}" for block in found.directions}
        return VectorFile(name, "gguf", digest, tensors, layers, found.model_hint)
    if data.startswith(b"PK"):
        return VectorFile(name, "npz", digest, parse_npz(data, source=name), {}, None)
    return VectorFile(name, "safetensors", digest, parse_safetensors(data, source=name), {}, None)


def describe_tensors(file: VectorFile) -> str:
    """What there is to choose from, with the norms that tell vectors apart."""
    layers = {tensor: layer for layer, tensor in file.layers.items()}
    parts = []
    for name, tensor in list(file.tensors.items())[:64]:
        norm = f", norm {float(torch.linalg.vector_norm(tensor.double())):.4g}" if tensor.is_floating_point() else ""
        layer = f"layer {layers[name]}: " if name in layers else ""
        parts.append(f"{layer}{name[:80]!r} of shape {tuple(tensor.shape)}{norm}")
    more = len(file.tensors) - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more else "") or "none"
