"""The analysis of one prompt."""

from __future__ import annotations

import time

import torch

from operators.analyse import layers, positions
from operators.analyse.frozen_blocks import FrozenBlocks
from operators.analyse.results import ANALYSIS_SCHEMA, Analysis, ScoredToken
from operators.analyse.threads import one_thread
from operators.analyse.tokens import VocabularyProjection
from operators.builder.checks import dtype_name
from operators.builder.concept import concept_from_text
from operators.core.errors import AnalysisError
from operators.core.progress import Progress, silent
from operators.maps.detach import RULE_SET
from operators.model.loading import LoadedModel, embed

MAX_MAP_BYTES = 4 * 2**30
"""Upper bound of the n d^2 numbers of one map; about twice as much is held at a time, beside the model."""
_ANSWERS = 5
"""How many of the model's next tokens are recorded."""


def analyse_prompt(
    text: str, loaded: LoadedModel, *, layer: int | None = None, progress: Progress = silent
) -> Analysis:
    """Everything about one prompt. ``layer``: whose output embedding is mapped; None means the last.

    Raises:
        ConceptError: the text has no tokens, or more than the model's context.
        AnalysisError: the layer is out of range, or the maps would be larger than MAX_MAP_BYTES or are not finite.
        UnsupportedModelError: the architecture has no detach table.
    """
    start = time.monotonic()
    ids = concept_from_text(text, loaded).ids
    layer = _resolve_layer(layer, loaded)
    _check_size(len(ids), loaded)
    vocabulary = VocabularyProjection(loaded)
    output = positions.output_map(loaded, ids, layer=layer, progress=progress)
    if not bool(torch.isfinite(output.jacobian).all()):
        raise AnalysisError(f"the Jacobian of {text!r} at layer {layer} is not finite in {dtype_name(loaded.dtype)}")
    reconstruction = positions.reconstruction(loaded, ids, output, layer=layer)
    by_position, offset_share = positions.analyse_positions(ids, output, vocabulary, progress=progress)
    reads, reads_against = positions.readings(output, vocabulary)
    # Freed before the maps of the layers are made, which are as large.
    del output
    with one_thread():
        answer = next_tokens(loaded, ids, vocabulary)
        frozen = FrozenBlocks(loaded.model, ids)
    by_layer = layers.analyse_layers(frozen, vocabulary, answer[0].id, progress=progress)
    return Analysis(
        schema=ANALYSIS_SCHEMA,
        text=text,
        model=loaded.name,
        architecture=type(loaded.model).__name__,
        model_fingerprint=loaded.fingerprint,
        rule_set=RULE_SET,
        dtype=dtype_name(loaded.dtype),
        num_layers=loaded.num_layers,
        hidden_size=loaded.hidden_size,
        layer=layer,
        answer=answer,
        offset_share=offset_share,
        reads=reads,
        reads_against=reads_against,
        reconstruction=reconstruction,
        positions=by_position,
        layers=by_layer,
        emergence=layers.emergence(by_layer),
        seconds=round(time.monotonic() - start, 2),
    )


def next_tokens(loaded: LoadedModel, ids: tuple[int, ...], vocabulary: VocabularyProjection) -> tuple[ScoredToken, ...]:
    """The model's most likely next tokens with their probabilities, best first."""
    embeddings = embed(loaded.model, torch.tensor(ids, device=loaded.device))
    with torch.no_grad():
        logits = loaded.model(inputs_embeds=embeddings[None], use_cache=False).logits[0, -1:]
    return vocabulary.top(logits.float().softmax(-1), _ANSWERS)[0]


def _resolve_layer(layer: int | None, loaded: LoadedModel) -> int:
    if layer is None:
        return loaded.num_layers
    if not 1 <= layer <= loaded.num_layers:
        raise AnalysisError(f"layer {layer} of {loaded.name}; 1 to {loaded.num_layers} are accepted")
    return layer


def _check_size(n: int, loaded: LoadedModel) -> None:
    # Maps are at least float32, whatever the dtype of the model.
    per_token = loaded.hidden_size**2 * torch.promote_types(loaded.dtype, torch.float32).itemsize
    if n * per_token > MAX_MAP_BYTES:
        raise AnalysisError(
            f"text has {n} tokens; the maps of {loaded.name} in {dtype_name(loaded.dtype)} take "
            f"{per_token / 1e6:.3g} MB each, and at most {MAX_MAP_BYTES // per_token} are held"
        )
