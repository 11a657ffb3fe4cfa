"""``build``: one operator from the command line, or many from a file of concepts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from operators.commands import _output as report
from operators.commands._options import (
    DeviceChoice,
    DeviceOption,
    DTypeChoice,
    DTypeOption,
    JsonOption,
    MaxMemoryOption,
    ModelOption,
    ProfileChoice,
    RuleChoice,
    StoreOption,
    device_or_default,
    memory_or_default,
    open_store,
)
from operators.commands._recipe import build_file
from operators.core.progress import progress_bars


def build(
    name: Annotated[
        str | None, typer.Argument(help="Name of the operator; not with --file.", show_default=False)
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="The concept; several texts become one operator.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="In place of NAME and what describes it: a TOML file of concepts.", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="With --file: only this concept.", show_default=False)
    ] = None,
    model: ModelOption = None,
    profile: Annotated[
        ProfileChoice | None,
        typer.Option(help="Convention of target and injection (default: residual).", show_default=False),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Target layer (default: two thirds of the depth).", show_default=False)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Recommended strength; negative pushes away (default: 0.5).", show_default=False),
    ] = None,
    rule: Annotated[
        RuleChoice | None, typer.Option(help="Recommended rule (default: cumulative).", show_default=False)
    ] = None,
    blend: Annotated[
        float | None,
        typer.Option(help="Recommended blend, from 0 (operator) to 1 (anchor) (default: 0).", show_default=False),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="R|full", help="Rank of the operator, or the exact one (default: 64).", show_default=False
        ),
    ] = None,
    tol: Annotated[
        float | None,
        typer.Option(help="In place of a rank: the residual |J - U B| / |J| to reach.", show_default=False),
    ] = None,
    max_memory: MaxMemoryOption = None,
    dtype: DTypeOption = "float32",
    device: DeviceOption = None,
    store_path: StoreOption = None,
    words: Annotated[
        str | None,
        typer.Option(help='What shows the concept in a text: "golden gate,bridge".', show_default=False),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Find rule, blend, strength and a layer not given by trial; needs words."),
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an operator of that name.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compute the operator of a concept, check it against the model, and store it.

    With --file, of every concept in a TOML file: those that are in the store already are not built again, so that the
    same command goes on where it was stopped. With --calibrate, those whose setting the file leaves open are
    calibrated.
    """
    asked = {
        "name": name,
        "texts": text or None,
        "profile": profile,
        "layer": layer,
        "strength": strength,
        "rule": rule,
        "blend": blend,
        "rank": int(rank) if rank and rank.removeprefix("-").isdecimal() else rank,
        "tolerance": tol,
        "words": None if words is None else [word.strip() for word in words.split(",")],
    }
    asked = {key: value for key, value in asked.items() if value is not None}
    if file is not None:
        if asked:
            said = ", ".join(
                {"name": "NAME", "texts": "--text", "tolerance": "--tol"}.get(key, f"--{key}") for key in asked
            )
            raise typer.BadParameter(f"{said} is for one operator; with --file, the file says it")
        build_file(
            file,
            only or [],
            model=model,
            dtype=dtype,
            device=device,
            store_path=store_path,
            max_memory=max_memory,
            replace=replace,
            calibrate=calibrate,
            as_json=as_json,
        )
        return
    if "name" not in asked or "texts" not in asked:
        raise typer.BadParameter("either NAME and --text, or --file, is needed")
    if calibrate and "words" not in asked:
        raise typer.BadParameter("--calibrate needs --words: what shows the concept in a text")
    if calibrate and (given := [f"--{key}" for key in ("strength", "rule", "blend") if key in asked]):
        raise typer.BadParameter(
            f"{', '.join(given)} and --calibrate: what is given is not looked for; one is accepted"
        )
    if only:
        raise typer.BadParameter("--only picks concepts of a --file; there is none")
    _build_one(
        asked, model, dtype, device, store_path, max_memory, replace=replace, calibrate=calibrate, as_json=as_json
    )


def _build_one(
    asked: dict[str, Any],
    model: str | None,
    dtype: DTypeChoice,
    device: DeviceChoice | None,
    store_path: Path | None,
    max_memory: str | None,
    *,
    replace: bool,
    calibrate: bool,
    as_json: bool,
) -> None:
    start = time.monotonic()
    with report.reporting(as_json):
        from operators.recipes.concept_entry import ConceptEntry, validate_value

        # Everything that can be refused without the model is refused before it is loaded.
        store = open_store(store_path)
        entry = ConceptEntry(**{key: validate_value(key, value) for key, value in asked.items()})
        store.check_free(entry.name, replace=replace)
        budget = memory_or_default(max_memory)

        from operators.builder.build import build_operator
        from operators.model.loading import default_model, load_model
        from operators.recipes.run import build_spec

        loaded = load_model(model or default_model(), dtype=dtype, device=device_or_default(device))
        spec = build_spec(entry, loaded)
        with report.product_progress() as progress:
            artifact = build_operator(spec, loaded, max_memory=budget, progress=progress)
        if calibrate:
            from operators.commands.calibrate import tuned

            layers = None if entry.layer is None else (entry.layer,)
            with progress_bars() as progress:
                artifact = tuned(artifact, loaded, layers=layers, max_memory=budget, progress=progress)
        path = store.save(entry.name, artifact, replace=replace)
        seconds = round(time.monotonic() - start, 2)
        answer = report.described(entry.name, path, artifact)
        answer["concept_tokens"] = [loaded.tokenizer.decode([token]) for token in spec.texts[0].ids]
        answer["seconds"] = seconds
        if artifact.header.calibration is not None:
            answer["found"] = artifact.header.calibration.chosen is not None
        report.tell(answer, report.operator_lines(answer, seconds=seconds), as_json=as_json)
