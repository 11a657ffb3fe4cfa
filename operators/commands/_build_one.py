"""``build NAME --text``: one operator from the command line."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from operators.commands import _describe as describe
from operators.commands import _output as output
from operators.commands._build_plan import print_plan
from operators.commands._calibration import WORK, calibrate_new, forget
from operators.commands._options import (
    BuildOptions,
    check_new,
    default_device,
    open_store,
    parse_memory,
    streaming_warnings,
)
from operators.core.claims import claim
from operators.core.progress import shown_progress, working
from operators.core.store import check_name


def build_one(described: Mapping[str, Any], options: BuildOptions, neutral: Path | None) -> None:
    """Builds, checks and stores one operator.

    ``described`` has the fields of a :class:`ConceptEntry` as given; ``neutral`` is a file of neutral texts, or None
    for those that ship.
    """
    start = time.monotonic()
    with output.exit_on_error(options.as_json), ExitStack() as held:
        # Everything that can be refused without the model is refused before it is loaded, and a name before torch is.
        store = open_store(options.store_path)
        if options.plan:
            with output.wrong_usage():
                check_name(described["name"])
        else:
            check_new(store, described["name"], replace=options.replace)
        from operators.recipes.concept_entry import ConceptEntry, validate_value

        with output.wrong_usage():
            entry = ConceptEntry(**{key: validate_value(key, value) for key, value in described.items()})
        if options.calibrate:
            held.enter_context(claim(store, entry.name, WORK))
        memory, device_memory = parse_memory(options.max_memory), parse_memory(options.device_memory)
        from operators.builder.neutral import read_neutral_texts, tokenise_neutral
        from operators.builder.spec import check_first_token, resolve_spec
        from operators.recipes.tasks import build_spec, recommended_of

        # Of whatever model: it is only the strength that depends on it.
        with output.wrong_usage():
            check_first_token(recommended_of(entry, architecture=""))

        neutral_texts = None if neutral is None else read_neutral_texts(neutral)

        if options.plan:
            print_plan(entry, options, neutral_texts, start)
            return
        with working("loading torch and the model"):
            from operators.builder.build import build_operator
            from operators.maps.detach import family_of
            from operators.model.loading import default_model, load_model

            device = options.device or default_device()
            loaded = load_model(
                options.model or default_model(),
                dtype=options.dtype,
                device=device,
                attention=options.attention,
                check=family_of,
                stream=options.may_stream,
                device_memory=device_memory,
                # Before gigabytes are read for their digest.
                check_streamed=lambda outline: resolve_spec(
                    build_spec(entry, outline), outline, max_memory=memory, streamed=True
                ),
            )
        spec = dataclasses.replace(build_spec(entry, loaded), neutral=tokenise_neutral(loaded, neutral_texts))
        # Before minutes go into a calibration.
        warnings = [*describe.build_warnings(spec, loaded), *streaming_warnings(loaded, options)]
        output.print_warnings(warnings)
        with shown_progress(lines=not options.as_json) as progress:
            artifact = build_operator(spec, loaded, max_memory=memory, progress=progress)
        if options.calibrate:
            layers = None if entry.layer is None else (entry.layer,)
            with shown_progress(lines=not options.as_json) as progress:
                artifact = calibrate_new(
                    entry.name,
                    artifact,
                    loaded,
                    store,
                    layers=layers,
                    quick=options.quick,
                    max_memory=memory,
                    progress=progress,
                )
        path = store.save(entry.name, artifact, replace=options.replace)
        if options.calibrate:
            forget(store, entry.name)
        seconds = round(time.monotonic() - start, 2)
        answer = describe.operator_json(entry.name, path, store.read_header(entry.name))
        answer["last_tokens"] = [loaded.tokenizer.decode([text.ids[-1]]) for text in spec.texts]
        answer["warnings"] = warnings
        answer["seconds"] = seconds
        if artifact.header.calibration is not None:
            answer["found"] = artifact.header.calibration.chosen is not None
        output.print_answer(answer, describe.operator_lines(answer, seconds=seconds), as_json=options.as_json)
