"""``build``: one operator from the command line, or many from a file of concepts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from operators.commands._build_file import build_file
from operators.commands._build_one import build_one
from operators.commands._options import (
    AttentionOption,
    BuildOptions,
    DeviceOption,
    DTypeOption,
    JsonOption,
    MaxMemoryOption,
    ModelOption,
    StoreOption,
)
from operators.core.header import SETTING_FIELDS, Anchor, FirstToken, Profile, Rule
from operators.core.numbers import read_whole


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
        Profile | None,
        typer.Option(help="Convention of target and injection (default: residual).", show_default=False),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Target layer (default: two thirds of the depth).", show_default=False)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Recommended strength; negative pushes away (default: the model's, mostly 0.3; golden: 0.5).",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        Rule | None, typer.Option(help="Recommended rule (default: cumulative).", show_default=False)
    ] = None,
    blend: Annotated[
        float | None,
        typer.Option(
            help="Recommended blend, from 0 (operator) to 1 (anchor) (default: 1; golden: 0).", show_default=False
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            metavar="POSITIONS",
            help="Recommended positions of a text: first, prompt, generated, 4.., 0..8, generated:0..5 (default: all).",
            show_default=False,
        ),
    ] = None,
    anchor: Annotated[
        Anchor | None,
        typer.Option(
            help="Recommended anchor: what the concept adds to neutral texts, or its hidden state itself (default: "
            "contrast).",
            show_default=False,
        ),
    ] = None,
    first_token: Annotated[
        FirstToken | None,
        typer.Option(
            "--first-token", help="Recommended push of the first token (default: operator).", show_default=False
        ),
    ] = None,
    neutral: Annotated[
        Path | None,
        typer.Option(help="Texts that the contrast is against, one per line (default: shipped).", show_default=False),
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
    device_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bound of the memory that a build takes of a CUDA device, with the weights there; a model that is "
            "larger is streamed (default: most of what is free there).",
            show_default=False,
        ),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read the blocks of the model one at a time from its files, within --max-memory in all (default: "
            "where they do not fit into the memory).",
        ),
    ] = False,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Refuse a model that does not fit into the memory.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it would take: passes, products, memory, time; and leave.")
    ] = False,
    dtype: DTypeOption = "float32",
    device: DeviceOption = None,
    attention: AttentionOption = None,
    store_path: StoreOption = None,
    words: Annotated[
        str | None,
        typer.Option(help='What shows the concept in a text: "golden gate,bridge".', show_default=False),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Find rule, blend, strength and a layer not given by trial; needs words."),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="With --calibrate: fewer layers, prompts and strengths.")
    ] = False,
    jobs: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="With --file: processes that build at once, each with its share of cores and --max-memory.",
        ),
    ] = 1,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Replace an operator of that name; with --file, those whose entries have changed (an unchanged one is "
            "up to date, and stays).",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compute the operator of a concept, check it against the model, and store it.

    With --file, of every concept in a TOML file: those that are in the store already are not built again, so that the
    same command goes on where it was stopped. With --calibrate, those whose setting the file leaves open are
    calibrated; a calibration that is stopped goes on, too.
    """
    options = BuildOptions(
        *(model, dtype, device, attention, store_path, max_memory, replace, calibrate, quick, as_json),
        stream=True if stream else False if no_stream else None,
        jobs=jobs,
        device_memory=device_memory,
        plan=plan,
    )
    if stream and no_stream:
        raise typer.BadParameter("--stream and --no-stream were both given; one is accepted")
    if calibrate and (stream or plan):
        raise typer.BadParameter("--calibrate writes texts, which needs the whole model: neither --stream nor --plan")
    if device_memory is not None and (calibrate or jobs > 1):
        raise typer.BadParameter("--device-memory bounds one build: neither --calibrate nor --jobs above 1 is accepted")
    if plan and file is not None:
        raise typer.BadParameter("--plan is of one operator, and not of --file")
    if stream and jobs > 1:
        raise typer.BadParameter("--jobs shares one model in memory: with --stream, one is accepted")
    described = {
        "name": name,
        "texts": text or None,
        "profile": profile,
        "layer": layer,
        "strength": strength,
        "rule": rule,
        "blend": blend,
        "positions": positions,
        "anchor": anchor,
        "first_token": first_token,
        "rank": _rank(rank),
        "tolerance": tol,
        "words": None if words is None else [word.strip() for word in words.split(",")],
    }
    described = {key: value for key, value in described.items() if value is not None}
    if quick and not calibrate:
        raise typer.BadParameter("--quick is of --calibrate, which was not given")
    if file is None:
        if jobs != 1:
            raise typer.BadParameter("--jobs is of --file: one operator is built by one process")
        _check_usage(described, only, calibrate)
        build_one(described, options, neutral)
    elif described or neutral is not None:
        given = ", ".join([_option(key) for key in described] + ["--neutral"] * (neutral is not None))
        raise typer.BadParameter(f"{given} is for one operator; with --file, the file says it")
    else:
        build_file(file, only or [], options)


def _rank(text: str | None) -> int | str | None:
    """The number that a text is; a word such as "full" stays."""
    try:
        return None if text is None else read_whole(text)
    except ValueError:
        return text


def _check_usage(described: dict[str, Any], only: list[str] | None, calibrate: bool) -> None:
    """What one operator needs on the command line. Raises :class:`typer.BadParameter`."""
    if "name" not in described or "texts" not in described:
        raise typer.BadParameter("either NAME and --text, or --file, is needed")
    if calibrate and "words" not in described:
        raise typer.BadParameter("--calibrate needs --words: what shows the concept in a text")
    if calibrate and (given := [_option(key) for key in SETTING_FIELDS if key in described]):
        raise typer.BadParameter(
            f"{', '.join(given)} and --calibrate: a given value cannot be calibrated; one or the other is accepted"
        )
    if only:
        raise typer.BadParameter("--only picks concepts of a --file; there is none")


def _option(key: str) -> str:
    """What gives a field of an entry on the command line."""
    return {"name": "NAME", "texts": "--text", "tolerance": "--tol"}.get(key, f"--{key.replace('_', '-')}")
