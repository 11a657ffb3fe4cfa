"""The map of a concept's texts, held to the model: of a model in memory, or block by block of one that is streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from operators.builder.checks import (
    MappedText,
    check_gradient_error,
    check_gradients,
    check_mapped,
    check_replay,
    dtype_name,
)
from operators.builder.neutral import neutral_mean
from operators.builder.spec import BuildParameters, BuildSpec
from operators.core.header import NeutralTexts
from operators.core.progress import Progress
from operators.maps.replay import Replay
from operators.maps.streamed_map import StreamedMap
from operators.maps.sweeps import Sweeps, record_texts
from operators.maps.weighted_map import WeightedMap
from operators.model.loading import LoadedModel
from operators.model.rope import rope_changes


@dataclass(frozen=True, eq=False)
class Mapped:
    """Filled by :func:`map_texts`. ``neutral`` (d,) float64 is the mean target of the neutral texts."""

    texts: Sequence[MappedText]
    summed: WeightedMap | StreamedMap
    neutral: torch.Tensor


def map_texts(
    spec: BuildSpec,
    loaded: LoadedModel,
    parameters: BuildParameters,
    neutral: NeutralTexts,
    *,
    on_products: Callable[[int], None],
    progress: Progress,
) -> Mapped:
    """The map of the texts of ``spec``, after every check that needs no more than it.

    Raises:
        UnsupportedModelError: the architecture has no detach table.
        ReconstructionError: the detached forward pass, its gradients or the reconstruction is off.
    """
    make = _in_memory if loaded.blocks is None else _streamed
    return make(spec, loaded, parameters, neutral, on_products, progress)


def _in_memory(
    spec: BuildSpec,
    loaded: LoadedModel,
    parameters: BuildParameters,
    neutral: NeutralTexts,
    on_products: Callable[[int], None],
    _progress: Progress,
) -> Mapped:
    layer = parameters.layer
    replays = [
        Replay(
            loaded.model,
            text.ids,
            layer=layer,
            profile=spec.profile,
            vectors_per_pass=parameters.vectors_per_pass,
            on_products=on_products,
        )
        for text in spec.texts
    ]
    for text, replay in zip(spec.texts, replays, strict=True):
        check_replay(text, replay, loaded, layer=layer, profile=spec.profile)
    check_gradients(spec.texts[0], replays[0], loaded, layer=layer, profile=spec.profile)
    mean = neutral_mean(neutral, loaded, layer=layer, profile=spec.profile)
    return Mapped(replays, WeightedMap(replays, spec.shares), mean)


def _streamed(
    spec: BuildSpec,
    loaded: LoadedModel,
    parameters: BuildParameters,
    neutral: NeutralTexts,
    _on_products: Callable[[int], None],
    progress: Progress,
) -> Mapped:
    layer = parameters.layer
    sweeps = Sweeps(
        loaded,
        layer=layer,
        profile=spec.profile,
        vectors_per_pass=parameters.vectors_per_pass,
        passes=spec.num_passes(parameters.rank),
        progress=progress,
    )
    # Factors that depend on the length of a text are those of the longest of texts side by side.
    together = not rope_changes(loaded.model.config.get_text_config())
    recorded = record_texts(sweeps, [text.ids for text in spec.texts], neutral.ids, together=together)
    for text, mapped in zip(spec.texts, recorded.texts, strict=True):
        check_mapped(text, mapped, mapped.plain, loaded, layer=layer)
    check_gradient_error(recorded.gradient_error, layer, dtype_name(loaded.dtype))
    return Mapped(recorded.texts, StreamedMap(sweeps, recorded.texts, spec.shares), recorded.plain.mean(0))
