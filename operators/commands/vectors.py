"""``import`` and ``export``: vectors from other programs and for them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from operators.commands import _describe as describe
from operators.commands import _output as output
from operators.commands._options import (
    JsonOption,
    ModelOption,
    NameArgument,
    ReplaceOption,
    StoreOption,
    check_new,
    default_device,
    open_store,
)

StrengthOption = Annotated[
    float | None, typer.Option(help="Strength to recommend (default: that of all operators).", show_default=False)
]


def import_vectors(
    name: NameArgument,
    file: Annotated[
        Path, typer.Argument(help="GGUF control vector (repeng, llama.cpp), safetensors or npz.", show_default=False)
    ],
    about: Annotated[
        str,
        typer.Option(help="What it steers towards and who made it how: no such file says it.", show_default=False),
    ],
    layers: Annotated[
        list[int] | None,
        typer.Option(
            "--layer",
            help="Layer whose input is pushed: of a GGUF file, direction.N is for layer N+1. Several give several "
            "operators, NAME-layerN each.",
            show_default=False,
        ),
    ] = None,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="One operator for each layer of a GGUF file: NAME-layerN.")
    ] = False,
    tensor: Annotated[
        str | None, typer.Option(help="Which tensor of a safetensors or npz file.", show_default=False)
    ] = None,
    strength: StrengthOption = None,
    any_model_hint: Annotated[
        bool, typer.Option("--any-model-hint", help="Take a GGUF file that names another kind of model.")
    ] = False,
    model: ModelOption = None,
    store_path: StoreOption = None,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take vectors of another program into the store, as operators of rank 0.

    Direction and layer carry over. A coefficient does not: strengths here are relative to each token's hidden state.
    """
    start = time.monotonic()
    with output.exit_on_error(as_json):
        from operators.builder.guidance import strength_warnings
        from operators.core.store import check_name
        from operators.vectors.imported import check_model_hint, choose_tensors, import_vector
        from operators.vectors.vector_file import read_vector_file
        from operators.vectors.vector_operator import check_description

        # Everything that can be refused without the model is refused before it is loaded.
        store = open_store(store_path)
        with output.wrong_usage():
            check_description(about, strength)
            check_name(name)
        found = read_vector_file(file)
        chosen = choose_tensors(found, layers or [], tensor, all_layers=all_layers)
        several = len(chosen) > 1 or all_layers
        names = {layer: f"{name}-layer{layer}" if several else name for layer in chosen}
        for each in names.values():
            check_new(store, each, replace=replace)

        from operators.model.loading import default_model, load_model

        loaded = load_model(model or default_model(), device=default_device())
        if not any_model_hint:
            check_model_hint(found, loaded)
        # A file for a whole model has one for the last block's output too, which is no block's input.
        left_out = {layer: chosen.pop(layer) for layer in [*chosen] if all_layers and layer == loaded.num_layers}
        made = {
            names[layer]: import_vector(found, each, loaded, layer=layer, about=about, strength=strength)
            for layer, each in chosen.items()
        }
        operators = []
        for each, artifact in made.items():
            path = store.save(each, artifact, replace=replace)
            operators.append(describe.operator_json(each, path, store.read_header(each)))
        # All recommend the same.
        warnings = strength_warnings(next(iter(made.values())).header.recommended.strength) if made else []
        output.print_warnings(warnings)
        seconds = round(time.monotonic() - start, 2)
        answer: dict[str, Any] = {"file": str(file), "operators": operators, "seconds": seconds}
        answer["warnings"] = warnings
        answer["left_out"] = list(left_out.values())
        lines = (
            describe.operator_lines(operators[0], seconds=seconds)
            if not several
            else [*describe.list_lines(operators), f"{len(operators)} vectors: {seconds} s, {store.path}"]
        )
        lines += [f"left out: {each}, added to the last block's output" for each in left_out.values()]
        output.print_answer(answer, lines, as_json=as_json)


def export(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Operators of different layers.", show_default=False)
    ],
    gguf: Annotated[Path, typer.Option(help="File to write, such as vector.gguf.", show_default=False)],
    model_hint: Annotated[
        str | None,
        typer.Option(help="Kind of model to write into the file (default: the operators').", show_default=False),
    ] = None,
    store_path: StoreOption = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a file of that name.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the anchors of operators as one control vector for repeng and llama.cpp, and say what that leaves out."""
    with output.exit_on_error(as_json):
        from operators.vectors.export import export_gguf, what_is_lost

        store = open_store(store_path)
        operators = {name: store.load(name) for name in dict.fromkeys(names)}
        tensors = export_gguf(operators, gguf, model_hint=model_hint, replace=replace)
        lost = {name: what_is_lost(artifact.header) for name, artifact in operators.items()}
        norms = {name: float(artifact.anchor.double().norm()) for name, artifact in operators.items()}
        rows = [
            {"name": name, "tensor": tensor, "norm": norms[name], "lost": lost[name]}
            for name, tensor in tensors.items()
        ]
        lines = [
            f"{name}: {tensor}, norm {norms[name]:.6g}; lost: {'; '.join(lost[name])}"
            for name, tensor in tensors.items()
        ]
        if "direction.0" in tensors.values():
            lines.append("direction.0: repeng reads it, llama.cpp has no place for it")
        output.print_answer({"file": str(gguf), "operators": rows}, [*lines, f"written: {gguf}"], as_json=as_json)
