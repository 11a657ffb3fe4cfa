"""`steer sweep`: every prompt under every operator at every strength, and what came of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import steer_client
from steer_client._cli import json_output
from steer_client._cli import options as o
from steer_client._cli.connection import connect
from steer_client._cli.connection_options import ConnectionOptions
from steer_client._cli.console import wide_console
from steer_client._cli.dose_chart import dose_chart
from steer_client._cli.expectations import COUNTED, Expectation, Verdict, judge, read_expectation
from steer_client._cli.marked_text import read_words
from steer_client._cli.sweep_options import read_operator, read_words_use
from steer_client._requests import LENS

if TYPE_CHECKING:
    from steer_client._cli.sweep_options import Strengths
    from steer_client._sweep.result import SweepResult

_SWEEP, _RESULT = "Sweep", "Result"

PromptsOption = Annotated[
    Path,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='A prompt per line; of .jsonl one {"id": ..., "prompt": ...}.',
        rich_help_panel=_SWEEP,
    ),
]
OperatorsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--operator",
        "-o",
        metavar="NAME=λ,λ[@β][:POSITIONS]",
        help="An operator and its strengths, each an arm of its own. May be repeated.",
        rich_help_panel=_SWEEP,
    ),
]
WordsToSteerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--word",
        "-w",
        metavar="WORD=λ,λ[:POSITIONS]",
        help="A word for the lens, or several in one direction, and strengths. May be repeated.",
        rich_help_panel=_SWEEP,
    ),
]
ControlOption = Annotated[
    bool,
    typer.Option(
        "--control",
        help="Add λ = 0 to every operator: its texts must be the plain ones, else exit status 1.",
        rich_help_panel=_SWEEP,
    ),
]
SeedsOption = Annotated[
    int | None,
    typer.Option(
        "--seeds", metavar="N", min=1, help="Draw every text N times: seeds 0 to N-1.", rich_help_panel=_SWEEP
    ),
]
FoundWordsOption = Annotated[
    str | None,
    typer.Option(
        "--words", metavar="WORD,WORD", help="Words to find in the texts: hits, useful hits.", rich_help_panel=_SWEEP
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="Keep every text when it is finished (JSON lines); named again, go on where it ends.",
        rich_help_panel=_SWEEP,
    ),
]
InFlightOption = Annotated[
    int, typer.Option("--in-flight", metavar="N", min=1, help="Requests at once.", rich_help_panel=_SWEEP)
]
HtmlOption = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write a page: charts, table, texts.", rich_help_panel=_RESULT),
]
CsvOption = Annotated[
    Path | None, typer.Option("--csv", metavar="FILE", help="Write a line per text.", rich_help_panel=_RESULT)
]
ExpectOption = Annotated[
    list[str] | None,
    typer.Option(
        "--expect",
        metavar="[ARM:]METRIC>=NUMBER",
        help="Exit status 1 where it is not so: useful_hits>=0.5 of one arm at least, ocean=0.4:kl_p95<=2 of this one. "
        "METRIC is hits, useful_hits, kl_mean, kl_p95 or perplexity_ratio, or METRIC.low or .high, an end of its 95 % "
        "interval. May be repeated; those without ARM must hold of one and the same arm.",
        rich_help_panel=_RESULT,
    ),
]


def sweep(
    *,
    prompts: PromptsOption,
    operator: OperatorsOption = None,
    word: WordsToSteerOption = None,
    lens: o.LensOption = LENS,
    rule: o.RuleOption = None,
    control: ControlOption = False,
    seeds: SeedsOption = None,
    words: FoundWordsOption = None,
    out: OutOption = None,
    in_flight: InFlightOption = 4,
    html: HtmlOption = None,
    csv: CsvOption = None,
    expect: ExpectOption = None,
    sampling: o.SamplingOptions,
    connection: ConnectionOptions,
    as_json: o.JsonOption = False,
) -> None:
    """Decode the prompts of a file plain and under every operator at every strength: table, chart, files.

    steer sweep --prompts prompts.txt --operator ocean=0.2,0.4,0.6 --words sea,wave --expect 'useful_hits>=0.5'
    """
    strengths = _strengths(operator, word, lens=lens, rule=rule, control=control)
    found = read_words(words)
    params = sampling.params()
    expectations = _expectations(expect, _arms(prompts, strengths, seeds, params), has_words=bool(found))
    problem: steer_client.SteerError | None = None
    with connect(connection, as_json=as_json) as client:
        try:
            result = client.sweep(
                prompts,
                operators=strengths,
                words=found,
                seeds=seeds,
                sampling=params,
                out=out,
                in_flight=in_flight,
                timeout=connection.timeout,
            )
        except steer_client.ControlChangedError as error:
            result, problem = error.result, error
        verdicts = judge(expectations, result.summaries)
        if as_json:
            json_output.print_json(result.to_dict() | {"expectations": verdicts})
        else:
            _show(result, verdicts)
        _write(result, html, csv)
    if problem is not None:
        print(f"steer: {problem.message}", file=sys.stderr)
    if problem is not None or not all(each.met for each in verdicts):
        raise typer.Exit(1)


def _strengths(
    operators: list[str] | None, words: list[str] | None, *, lens: str, rule: o.RuleChoice | None, control: bool
) -> Strengths:
    if not operators and not words:
        raise typer.BadParameter("name at least one, or a --word, with its strengths", param_hint="'--operator'")
    strengths: Strengths = {}
    try:
        named: list[tuple[Any, list[float]]] = [
            read_operator(text, rule=None if rule is None else rule.value) for text in operators or ()
        ]
        named += [read_words_use(text, lens=lens) for text in words or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for key, numbers in named:
        strengths.setdefault(key, []).extend(numbers)
    if control:
        strengths = {key: numbers if 0.0 in numbers else [0.0, *numbers] for key, numbers in strengths.items()}
    return strengths


def _arms(
    prompts: Path, strengths: Strengths, seeds: int | None, params: steer_client.SamplingParams
) -> tuple[str, ...]:
    """The names of the arms. What makes no plan is a usage error."""
    # Imported here because it imports gRPC, and the commands' help does without.
    from steer_client._sweep.plan import make_plan

    try:
        return tuple(arm.name for arm in make_plan(prompts, strengths, seeds, params).arms)
    except steer_client.InvalidRequestError as error:
        raise typer.BadParameter(error.message) from None


def _expectations(texts: list[str] | None, arms: tuple[str, ...], *, has_words: bool) -> tuple[Expectation, ...]:
    try:
        expectations = tuple(map(read_expectation, texts or ()))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--expect'") from None
    for each in expectations:
        if each.arm is not None and each.arm not in arms:
            problem = f"{each.text!r}: there is no arm {each.arm!r}; the arms are {', '.join(arms)}"
            raise typer.BadParameter(problem, param_hint="'--expect'")
        if each.metric in COUNTED and not has_words:
            raise typer.BadParameter(f"{each.text!r}: name the words to find with --words", param_hint="'--expect'")
    return expectations


def _show(result: SweepResult, verdicts: tuple[Verdict, ...]) -> None:
    console = wide_console()
    console.print(result.table())
    console.print()
    console.print(dose_chart(result.summaries, "useful_hits" if result.words else "kl_mean"))
    for each in verdicts:
        where = f" by {', '.join(each.arms)}" if each.arms else ""
        console.print(f"{'✓ met' if each.met else '✗ not met'}: {each.expect}{where}", markup=False, soft_wrap=True)


def _write(result: SweepResult, html: Path | None, csv: Path | None) -> None:
    for path, write in ((html, result.html), (csv, result.to_csv)):
        try:
            if path is not None:
                write(path)
        except OSError as error:
            print(f"steer: cannot write {path}: {error.strerror or error}", file=sys.stderr)
            raise typer.Exit(1) from None
