"""``combine``: several stored operators with signed weights, as one."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from operators.commands import _describe as describe
from operators.commands import _output as output
from operators.commands._options import (
    AttentionOption,
    DeviceOption,
    DTypeOption,
    JsonOption,
    MaxMemoryOption,
    ModelOption,
    NameArgument,
    ReplaceOption,
    StoreOption,
    check_new,
    default_device,
    open_store,
    parse_memory,
)
from operators.core.errors import BuildError
from operators.core.numbers import read_decimal
from operators.core.progress import shown_progress


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
    attention: AttentionOption = None,
    max_memory: MaxMemoryOption = None,
    store_path: StoreOption = None,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build one operator from several of one layer and profile. It has one direction, and so one operator's dose."""
    start = time.monotonic()
    with output.exit_on_error(as_json):
        # Before torch is loaded.
        store = open_store(store_path)
        check_new(store, name, replace=replace)
        from operators.builder.combine import WeightedOperator
        from operators.builder.combine import combine as combine_operators
        from operators.builder.guidance import strength_warnings
        from operators.maps.detach import family_of
        from operators.model.loading import load_model

        with output.wrong_usage():
            weights = [_parse_member(member) for member in members]
        weighted = [WeightedOperator(member, store.load(member), weight) for member, weight in weights]
        memory = parse_memory(max_memory)
        source = model or weighted[0].artifact.header.model
        loaded = load_model(
            source, dtype=dtype, device=device or default_device(), attention=attention, check=family_of
        )
        with shown_progress(lines=not as_json) as progress:
            artifact = combine_operators(weighted, loaded, rank=rank, max_memory=memory, progress=progress)
        output.print_warnings(strength_warnings(artifact.header.recommended.strength))
        path = store.save(name, artifact, replace=replace)
        answer = describe.operator_json(name, path, store.read_header(name))
        answer["seconds"] = round(time.monotonic() - start, 2)
        mixture = " ".join(f"{member.weight:+g} {member.name}" for member in weighted)
        lines = describe.operator_lines(answer, mixture=mixture, seconds=answer["seconds"])
        output.print_answer(answer, lines, as_json=as_json)


def _parse_member(member: str) -> tuple[str, float]:
    name, equals, weight = member.partition("=")
    try:
        return name, read_decimal(weight) if equals else 1.0
    except ValueError:
        raise BuildError(f"member {member!r}: OPERATOR=WEIGHT with a number as weight is accepted") from None
