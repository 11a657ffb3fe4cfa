"""Vectors of other programs as operators.

repeng and llama.cpp add c v to the output of a block: a push of c |v|, whatever the hidden state. Here a push is
(lambda/2) |h|, along v/|v|: so the direction and the place carry over and the coefficient does not. At a token whose
hidden state has the norm |h|, coefficient c is the strength lambda = 2 c |v| / |h|; the header keeps |v|.
"""

from __future__ import annotations

from collections.abc import Sequence

from operators.core.artifact import OperatorArtifact
from operators.core.errors import VectorError
from operators.core.vector_source import MAX_WORD, ImportedVector
from operators.model.loading import LoadedModel
from operators.vectors.vector_file import VectorFile, describe_tensors
from operators.vectors.vector_operator import vector_norm, vector_operator


def choose_tensors(
    file: VectorFile, layers: Sequence[int], tensor: str | None, *, all_layers: bool = False
) -> dict[int, str]:
    """Which tensor goes to which layer, from what was asked for and what the file says; nothing is guessed.

    Raises:
        VectorError: something is missing, or not in the file; lists what there is.
    """
    there = f"{file.name} has {describe_tensors(file)}"
    if len(set(layers)) < len(layers):
        raise VectorError(f"layers are {', '.join(map(str, layers))}; each once is accepted")
    if file.layers:
        if tensor is not None:
            raise VectorError(f"tensor {tensor!r}: a GGUF file is asked by --layer; {there}")
        if all_layers:
            return dict(file.layers)
        if not layers and len(file.layers) > 1:
            raise VectorError(f"the layer is needed (--layer, or --all-layers): {there}")
        wanted = layers or tuple(file.layers)
        missing = next((layer for layer in wanted if layer not in file.layers), None)
        if missing is not None:
            raise VectorError(f"there is no vector for layer {missing}: {there}")
        return {layer: file.layers[layer] for layer in wanted}
    if all_layers or len(layers) != 1:
        raise VectorError(f"one --layer is needed: a {file.file_format} file does not say of which layer it is")
    if tensor is None and len(file.tensors) != 1:
        raise VectorError(f"the tensor is needed (--tensor): {there}")
    tensor = next(iter(file.tensors)) if tensor is None else tensor
    if tensor not in file.tensors:
        raise VectorError(f"there is no tensor {tensor!r}: {there}")
    return {layers[0]: tensor}


def check_model_hint(file: VectorFile, loaded: LoadedModel) -> None:
    """Raises :class:`VectorError` where a file says that it is for another kind of model."""
    kind = loaded.model.config.get_text_config().model_type
    kinds = {kind, loaded.model.config.model_type}
    if file.model_hint is not None and file.model_hint not in kinds:
        raise VectorError(
            f"{file.name} is for a model of kind {file.model_hint!r}; {loaded.name} is {kind!r} "
            "(--any-model-hint, where another program names the same kind otherwise)"
        )


def import_vector(
    file: VectorFile, tensor: str, loaded: LoadedModel, *, layer: int, about: str, strength: float | None = None
) -> OperatorArtifact:
    """One tensor of a file as an operator that pushes the input of block ``layer``; its numbers stay as they are.

    Raises:
        BuildError: the model has no such layer.
        VectorError: the tensor is no vector that can push, or of a model of another width.
    """
    subject = f"{file.name}: tensor {tensor[:80]!r}"
    if len(tensor) > MAX_WORD:
        raise VectorError(f"{subject} has a name of {len(tensor)} characters; at most {MAX_WORD} are accepted")
    vector = file.tensors[tensor]
    source = ImportedVector(
        norm=vector_norm(vector, subject),
        file_format=file.file_format,
        file_digest=file.digest,
        tensor=tensor,
        model_hint=file.model_hint,
    )
    return vector_operator(vector, source, loaded, layer=layer, about=about, strength=strength, subject=subject)
