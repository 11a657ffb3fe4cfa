"""``combine``: several stored operators with signed weights, as one."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from operators.commands import _output as report
from operators.commands._options import (
    DeviceOption,
    DTypeOption,
    JsonOption,
    MaxMemoryOption,
    ModelOption,
    NameArgument,
    StoreOption,
    device_or_default,
    memory_or_default,
    open_store,
)
from operators.core.errors import BuildError


def combine(
    name: NameArgument,
    members: Annotated[
        list[str],
        typer.Argument(
            metavar="OPERATOR=WEIGHT...", help="Two or more; a negative weight pushes away.", show_default=False
        ),
    ],
    rank: Annotated[
        int | None, typer.Option(help="Rank of the mixture (default: its members' largest).", show_default=False)
    ] = None,
    model: ModelOption = None,
    dtype: DTypeOption = "float32",
    device: DeviceOption = None,
    max_memory: MaxMemoryOption = None,
    store_path: StoreOption = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an operator of that name.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build one operator from several of one layer and profile. It has one direction, and so one operator's dose."""
    start = time.monotonic()
    with report.reporting(as_json):
        from operators.builder.combine import Part
        from operators.builder.combine import combine as mix
        from operators.model.loading import load_model

        store = open_store(store_path)
        store.check_free(name, replace=replace)
        weights = [_weight(member) for member in members]
        parts = [Part(member, store.load(member), weight) for member, weight in weights]
        budget = memory_or_default(max_memory)
        source = model or parts[0].artifact.header.model
        loaded = load_model(source, dtype=dtype, device=device_or_default(device))
        with report.product_progress() as progress:
            artifact = mix(parts, loaded, rank=rank, max_memory=budget, progress=progress)
        path = store.save(name, artifact, replace=replace)
        answer = report.described(name, path, artifact)
        answer["seconds"] = round(time.monotonic() - start, 2)
        told = " ".join(f"{part.weight:+g} {part.name}" for part in parts)
        lines = report.operator_lines(answer, mixture=told, seconds=answer["seconds"])
        report.tell(answer, lines, as_json=as_json)


def _weight(member: str) -> tuple[str, float]:
    name, equals, weight = member.partition("=")
    try:
        return name, float(weight) if equals else 1.0
    except ValueError:
        raise BuildError(f"member {member!r}: OPERATOR=WEIGHT with a number as weight is accepted") from None
