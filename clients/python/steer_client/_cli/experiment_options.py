"""Options of the commands that compare, sweep, score and vote."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

import steer_client
from steer_client._cli.arms import concept_words, read_arms
from steer_client._cli.marked_text import read_words
from steer_client._cli.options import SteeringOptions
from steer_client._defaults import STEERED

_ARMS = "Arms"

ArmOption = Annotated[
    list[str] | None,
    typer.Option(
        "--arm",
        metavar="NAME: OPERATOR ...",
        help='An arm of its own: "mild: ocean=0.2", "both: ocean=0.4@0.5:first tea=0.2", "cup: word(coffee)=0.12". '
        "May be repeated. --operator and --word together make one arm more, named steered.",
        rich_help_panel=_ARMS,
    ),
]
SamplesOption = Annotated[
    int,
    typer.Option(
        "--n", metavar="N", min=1, help="Samples of every text, one seed after the other.", rich_help_panel=_ARMS
    ),
]
MarkOption = Annotated[
    str | None,
    typer.Option(
        "--mark",
        metavar="WORD,WORD",
        help="Words to mark in the texts. Default: the words that steer, and the operators' names.",
        rich_help_panel=_ARMS,
    ),
]
JsonLinesOption = Annotated[
    bool,
    typer.Option(
        "--jsonl", help="Print one JSON object a line, one for each text.", rich_help_panel="Connection and output"
    ),
]

Arms: TypeAlias = "dict[str, tuple[steer_client.OperatorUse, ...]]"


def all_arms(steering: SteeringOptions, arm: list[str] | None) -> Arms:
    """The arm of --operator and --word, where there is one, and every --arm; a wrong one is a usage error."""
    rule: steer_client.Rule | None = None if steering.rule is None else steering.rule.value
    try:
        arms: Arms = read_arms(arm or (), rule=rule, kl=steering.kl, lens=steering.lens)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--arm'") from None
    uses = steering.uses(others=[use for each in arms.values() for use in each])
    if uses and STEERED in arms:
        raise typer.BadParameter(
            f"--operator and --word make the arm {STEERED!r}: give this one another name", param_hint="'--arm'"
        )
    return ({STEERED: uses} if uses else {}) | arms


def marked_words(mark: str | None, arms: Arms) -> tuple[str, ...]:
    """Those of --mark, else what the arms steer towards."""
    return concept_words(use for uses in arms.values() for use in uses) if mark is None else read_words(mark)
