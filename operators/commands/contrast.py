"""``contrast``: the difference of mean hidden states of two files of texts, as an operator of rank 0."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from operators.commands import _describe as describe
from operators.commands import _output as output
from operators.commands._options import (
    AttentionOption,
    DeviceOption,
    DTypeOption,
    JsonOption,
    ModelOption,
    NameArgument,
    ReplaceOption,
    StoreOption,
    check_new,
    default_device,
    open_store,
)
from operators.commands.vectors import StrengthOption
from operators.core.progress import shown_progress


def contrast(
    name: NameArgument,
    positive: Annotated[Path, typer.Option(help="Texts to push towards, one per line.", show_default=False)],
    negative: Annotated[Path, typer.Option(help="Texts to push away from, one per line.", show_default=False)],
    layer: Annotated[int, typer.Option(help="Layer whose input is read, and pushed.", show_default=False)],
    about: Annotated[
        str | None, typer.Option(help="What it is, in words (default: the names of the files).", show_default=False)
    ] = None,
    strength: StrengthOption = None,
    model: ModelOption = None,
    dtype: DTypeOption = "float32",
    device: DeviceOption = None,
    attention: AttentionOption = None,
    store_path: StoreOption = None,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a vector: the mean hidden state of some texts' last tokens, minus that of others'."""
    start = time.monotonic()
    with output.exit_on_error(as_json):
        # Everything that can be refused without the model is refused before it is loaded, and a name before torch is.
        store = open_store(store_path)
        check_new(store, name, replace=replace)
        from operators.builder.guidance import strength_warnings
        from operators.vectors.contrast import check_disjoint, contrast_operator, read_texts
        from operators.vectors.vector_operator import check_description

        with output.wrong_usage():
            check_description(about, strength)
        towards, away = read_texts(positive), read_texts(negative)
        check_disjoint(towards, away)

        from operators.model.loading import default_model, load_model

        loaded = load_model(
            model or default_model(), dtype=dtype, device=device or default_device(), attention=attention
        )
        with shown_progress(lines=not as_json) as progress:
            artifact = contrast_operator(
                towards, away, loaded, layer=layer, about=about, strength=strength, progress=progress
            )
        path = store.save(name, artifact, replace=replace)
        warnings = strength_warnings(artifact.header.recommended.strength)
        output.print_warnings(warnings)
        answer = describe.operator_json(name, path, store.read_header(name))
        answer["warnings"] = warnings
        answer["seconds"] = round(time.monotonic() - start, 2)
        output.print_answer(answer, describe.operator_lines(answer, seconds=answer["seconds"]), as_json=as_json)
