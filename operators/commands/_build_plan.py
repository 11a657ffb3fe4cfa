"""``build --plan``: what a build will take, before a weight is read."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from operators.commands import _output as output
from operators.commands._options import BuildOptions, default_device, parse_memory

if TYPE_CHECKING:
    from operators.builder.plan import BuildPlan
    from operators.builder.spec import BuildSpec
    from operators.model.survey import ModelOutline
    from operators.recipes.concept_entry import ConceptEntry

_LETTERS_PER_TOKEN = 4
"""Where there is no tokenizer."""


def print_plan(entry: ConceptEntry, options: BuildOptions, neutral: tuple[str, ...] | None, start: float) -> None:
    """Prints the plan of one operator; ``start`` is when the command began, by the monotonic clock."""
    import torch

    from operators.builder.concept import Concept, concept_from_text
    from operators.builder.machine import measure_machine
    from operators.builder.neutral import tokenise_neutral
    from operators.builder.plan import plan_build
    from operators.builder.spec import BuildSpec, resolve_spec
    from operators.core.neutral_texts import neutral_texts
    from operators.maps.detach import family_of
    from operators.model.loading import decoder_layers, default_model
    from operators.model.survey import outline_model

    outline = outline_model(
        options.model or default_model(),
        dtype=options.dtype,
        device=options.device or default_device(),
        attention=options.attention,
        checks=[family_of],
        device_memory=parse_memory(options.device_memory),
    )
    loaded = outline.loaded
    if outline.has_tokenizer:
        texts = tuple(concept_from_text(text, loaded) for text in entry.texts)
        plain = sum(map(len, tokenise_neutral(loaded, neutral).ids))
    else:
        texts = tuple(Concept(text, (0,) * _guessed_tokens(text)) for text in entry.texts)
        plain = sum(map(_guessed_tokens, neutral or neutral_texts()))
    spec = BuildSpec(texts, entry.profile or "residual", layer=entry.layer, rank=entry.rank, tolerance=entry.tolerance)
    streamed = options.stream if options.stream is not None else not outline.fits
    memory = parse_memory(options.max_memory)
    # What is refused is, before a second is spent.
    resolve_spec(spec, loaded, max_memory=memory, streamed=streamed)
    weights = (weight for weight in decoder_layers(loaded.model)[-1].parameters() if weight.dim() > 1)
    largest = max(weights, key=torch.Tensor.numel)
    wide = torch.promote_types(loaded.dtype, torch.float32)
    started = time.monotonic() - start
    shape = (int(largest.shape[-2]), int(largest.shape[-1]))
    machine = measure_machine(_rows(spec), shape, wide, outline.stored, outline.files, start=started)
    plan = plan_build(
        spec,
        loaded,
        machine,
        stored_itemsize=outline.stored.itemsize,
        digested=outline.digested,
        streamed=streamed,
        max_memory=memory,
        neutral_tokens=plain,
    )
    answer = _plan_json(plan, outline)
    output.print_answer(answer, _plan_lines(answer, guessed=not outline.has_tokenizer), as_json=options.as_json)


def _guessed_tokens(text: str) -> int:
    return 1 + len(text) // _LETTERS_PER_TOKEN


def _rows(spec: BuildSpec) -> int:
    """Of the GEMMs of a pass."""
    from operators.maps.replay import VECTORS_PER_PASS, group_size

    return group_size(VECTORS_PER_PASS, spec.num_positions) * spec.num_positions


def _plan_json(plan: BuildPlan, outline: ModelOutline) -> dict[str, Any]:
    answer = dataclasses.asdict(plan)
    answer["seconds"] = round(plan.seconds, 1)
    answer["parts"] = {part: round(seconds, 1) for part, seconds in plan.parts.items()}
    answer["flop"] = round(plan.flop)
    return {"model": outline.loaded.name, **answer, "weights_are_here": bool(outline.files)}


def _plan_lines(answer: dict[str, Any], *, guessed: bool) -> list[str]:
    from operators.core.capacity import format_bytes

    tokens = f"{answer['tokens']} tokens" + (" (guessed: there is no tokenizer)" if guessed else "")
    rank = "exact" if answer["rank"] is None else f"rank {answer['rank']}"
    way = f"streamed in {answer['passes']} passes over the blocks" if answer["streamed"] else "in memory"
    parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in answer["parts"].items() if seconds >= 1)
    held = "in all" if answer["streamed"] else "beside the model"
    where = "here"
    if answer["device_memory"] is not None:
        held += f", and {format_bytes(answer['device_memory'])} of the device's"
        where = "on the CPU here, whatever the device does"
    return [
        f"{answer['model']}: weights of {format_bytes(answer['weights'])}, {way}",
        f"layer {answer['layer']}, {rank}, {answer['texts']} text(s) of at most {tokens}: "
        f"{answer['products']} products",
        f"memory: at most {format_bytes(answer['memory'])} {held}; to read: {format_bytes(answer['read'])}",
        f"time: about {answer['seconds']:.0f} s {where}, if it is left to this ({parts})",
        "Nothing was built.",
    ]
