"""One prompt, analysed."""

from __future__ import annotations

import time

import torch

from operators.analyse import layers, positions
from operators.analyse.maps import FrozenBlocks
from operators.analyse.results import ANALYSIS_SCHEMA, Analysis, Token
from operators.analyse.tokens import Readout
from operators.builder.concept import concept_from_text
from operators.core.errors import AnalysisError
from operators.core.progress import Progress, silent
from operators.maps.detach import RULE_SET
from operators.model.loading import LoadedModel, embed

MAX_BYTES = 4 * 2**30
"""Of the n d^2 numbers of one map; about twice as much is held at a time, besides the model."""
_ANSWERS = 5


def analyse(text: str, loaded: LoadedModel, *, layer: int | None = None, progress: Progress = silent) -> Analysis:
    """Everything about one prompt. ``layer``: where the output embedding is taken, the last by default.

    Raises:
        ConceptError: the text has no tokens, or more than the model's context.
        AnalysisError: the layer is out of range; the maps would not fit; not finite.
        UnsupportedModelError: the architecture has no detach table.
    """
    start = time.monotonic()
    ids = concept_from_text(text, loaded).ids
    layer = _checked_layer(layer, loaded)
    _check_size(len(ids), loaded)
    readout = Readout(loaded)
    found = positions.output_map(loaded, ids, layer=layer, progress=progress)
    if not bool(torch.isfinite(found.jacobian).all()):
        raise AnalysisError(f"the Jacobian of {text!r} at layer {layer} is not finite in {dtype_name(loaded)}")
    reconstruction = positions.reconstruction(loaded, ids, found, layer=layer)
    described, offset_share = positions.positions(ids, found, readout, progress=progress)
    # As large as what comes next.
    del found
    answer = next_tokens(loaded, ids, readout)
    by_layer = layers.layers(FrozenBlocks(loaded.model, ids), readout, answer[0].id, progress=progress)
    return Analysis(
        schema=ANALYSIS_SCHEMA,
        text=text,
        model=loaded.name,
        architecture=type(loaded.model).__name__,
        model_fingerprint=loaded.fingerprint,
        rule_set=RULE_SET,
        dtype=dtype_name(loaded),
        num_layers=loaded.num_layers,
        hidden_size=loaded.hidden_size,
        layer=layer,
        answer=answer,
        offset_share=offset_share,
        reconstruction=reconstruction,
        positions=described,
        layers=by_layer,
        emergence=layers.emergence(by_layer),
        seconds=round(time.monotonic() - start, 2),
    )


def next_tokens(loaded: LoadedModel, ids: tuple[int, ...], readout: Readout) -> tuple[Token, ...]:
    """The model's most likely next tokens with their probabilities, best first."""
    embeddings = embed(loaded.model, torch.tensor(ids, device=loaded.device))
    with torch.no_grad():
        logits = loaded.model(inputs_embeds=embeddings[None], use_cache=False).logits[0, -1:]
    return readout.top(logits.float().softmax(-1), _ANSWERS)[0]


def dtype_name(loaded: LoadedModel) -> str:
    """float32, and so on."""
    return str(loaded.dtype).removeprefix("torch.")


def _checked_layer(layer: int | None, loaded: LoadedModel) -> int:
    if layer is None:
        return loaded.num_layers
    if not 1 <= layer <= loaded.num_layers:
        raise AnalysisError(f"layer {layer} of {loaded.name}; 1 to {loaded.num_layers} are accepted")
    return layer


def _check_size(n: int, loaded: LoadedModel) -> None:
    # Maps are at least in float32, whatever the model is in.
    per_token = loaded.hidden_size**2 * torch.promote_types(loaded.dtype, torch.float32).itemsize
    if n * per_token > MAX_BYTES:
        raise AnalysisError(
            f"text has {n} tokens; the maps of {loaded.name} in {dtype_name(loaded)} take {per_token / 1e6:.3g} MB "
            f"each, and at most {MAX_BYTES // per_token} are held"
        )
