"""Anchors of operators as a control vector for repeng and llama.cpp.

What goes is the anchor of each operator, unscaled, for the output of the block before the one that it pushes. A map, a
rule, a strength and a calibration have no place in such a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from operators.core.artifact import OperatorArtifact
from operators.core.errors import VectorError
from operators.core.header import OperatorHeader
from operators.core.vector_source import ImportedVector
from operators.vectors.gguf_file import ControlVector, write_control_vector


def export_gguf(
    operators: Mapping[str, OperatorArtifact], path: Path, *, model_hint: str | None = None, replace: bool = False
) -> dict[str, str]:
    """Writes the anchors of ``operators``, by name, into one file; returns the name of each one's tensor.

    Args:
        model_hint: the kind of model, such as "llama"; None means what the operators' files or their architecture say.

    Raises:
        VectorError: operators of different models or of one layer, one that pushes the input of the first block, no
            model hint, or a file that is there without ``replace`` or cannot be written.
    """
    if not replace and path.exists():
        raise VectorError(f"{path} is there already; --replace replaces it")
    headers = [artifact.header for artifact in operators.values()]
    tensors: dict[str, str] = {}
    directions = {}
    for name, artifact in operators.items():
        header = artifact.header
        if header.lens is not None:
            raise VectorError(f"{name!r} is a lens, which has no vector of its own; operators are accepted")
        if header.model_fingerprint != headers[0].model_fingerprint:
            raise VectorError(f"operator {name!r} is of {header.model}, others of {headers[0].model}: one is accepted")
        block = header.injection_layer - 1
        if block < 0:
            raise VectorError(f"operator {name!r} pushes the first block's input, which is no block's output")
        if block in directions:
            raise VectorError(f"operator {name!r} pushes block {block + 1}, as another does; one for each is accepted")
        directions[block] = artifact.anchor.to(torch.float32).numpy()
        tensors[name] = f"direction.{block}"
    hint = _model_hint(headers[0]) if model_hint is None else model_hint
    write_control_vector(path, ControlVector(hint, dict(sorted(directions.items()))))
    return tensors


def what_is_lost(header: OperatorHeader) -> list[str]:
    """What of an operator a control vector does not hold."""
    lost = []
    if header.vector is None:
        lost.append(f"its map (rank {header.rank}): its anchor alone is written")
    if header.dtype == "float64":
        lost.append("float64: numbers are rounded to float32")
    setting = header.recommended
    lost.append(
        f"its strength {setting.strength:g}, which is relative to |h|: a coefficient c pushes by c |v| whatever |h| is"
    )
    return lost


def _model_hint(header: OperatorHeader) -> str:
    if isinstance(header.vector, ImportedVector) and header.vector.model_hint is not None:
        return header.vector.model_hint
    import transformers

    found = getattr(transformers, header.architecture, None)
    config = getattr(found, "config_class", None)
    hint = getattr(config, "model_type", "")
    if not hint:
        raise VectorError(
            f"the kind of model of {header.architecture[:80]!r} is not known; --model-hint says it, such as 'llama'"
        )
    return str(hint)
