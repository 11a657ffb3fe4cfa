"""`steer vote`: a blind comparison of two arms, judged by a person."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import steer_client
from steer_client._cli import experiment_options as x
from steer_client._cli import json_output
from steer_client._cli import options as o
from steer_client._cli.connection import connect
from steer_client._cli.connection_options import ConnectionOptions
from steer_client._cli.formatting import escape_controls
from steer_client._cli.tally import tally, tally_lines
from steer_client._cli.vote_file import Answer, VoteFile
from steer_client._defaults import NORMAL

if TYPE_CHECKING:
    from steer_client._cli.experiment_options import Arms

PromptsOption = Annotated[
    Path,
    typer.Option("--prompts", metavar="FILE", help='A prompt per line; of .jsonl one {"id": ..., "prompt": ...}.'),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FILE", help="Keep every answer; named again, go on where it ends. Names no arm until the end."
    ),
]
QuestionOption = Annotated[
    str, typer.Option("--question", metavar="TEXT", help="What is asked of every pair of texts.")
]
CloseOption = Annotated[bool, typer.Option("--close", help="End the vote of --out with the answers that it has.")]

_ANSWERS = {"1": "1", "2": "2", "t": "tie", "tie": "tie", "s": "skip", "skip": "skip", "q": "quit", "quit": "quit"}
_MIN_WIDTH = 60


def vote(
    *,
    prompts: PromptsOption,
    steering: o.SteeringOptions,
    arm: x.ArmOption = None,
    question: QuestionOption = "Which text is better?",
    out: OutOption = None,
    close: CloseOption = False,
    sampling: o.SamplingOptions,
    connection: ConnectionOptions,
    as_json: o.JsonOption = False,
) -> None:
    """Judge two arms, or one and the plain text, without knowing which is which: answer 1, 2, tie, skip or quit.

    steer vote --prompts prompts.txt --operator ocean --out ocean-vote.jsonl --max-tokens 40
    """
    arms = x.all_arms(steering, arm)
    if len(arms) not in (1, 2):
        raise typer.BadParameter(
            f"two arms are compared, or one with the plain text; given are {len(arms)}", param_hint="'--arm'"
        )
    if close and out is None:
        raise typer.BadParameter("there is no --out that has answers", param_hint="'--close'")
    by_id = _read_prompts(prompts)
    params = sampling.params()
    # Where stdout is for JSON, the texts are shown beside it.
    console = Console(highlight=False, stderr=as_json)
    with connect(connection, as_json=as_json) as client:
        file = VoteFile(out, _plan(client, by_id, arms, params, question))
        names = (next(iter(arms)), NORMAL if len(arms) == 1 else list(arms)[1])
        if file.result is None:
            is_whole = close or _ask_all(client, file, by_id, arms, params, names, question, console)
            if is_whole or out is None:
                file.close(tally(names, file.answers.values(), file.is_swapped, len(by_id)))
        _report(file, len(by_id), as_json=as_json)


def _ask_all(
    client: steer_client.SteerClient,
    file: VoteFile,
    prompts: Mapping[str, steer_client.Prompt],
    arms: Arms,
    params: steer_client.SamplingParams,
    names: tuple[str, str],
    question: str,
    console: Console,
) -> bool:
    """Asks about every prompt that has no answer; False where the person stopped before the last."""
    from steer_client._sweep.plan import prompt_text

    for number, (prompt_id, prompt) in enumerate(prompts.items(), 1):
        if prompt_id in file.answers:
            continue
        # Both texts are whole before either is shown, so no arm is told by its speed.
        result = client.compare(prompt, arms=arms, sampling=params, score=False, normal=NORMAL in names)
        texts = tuple(_text(result, name) for name in (names[::-1] if file.is_swapped(prompt_id) else names))
        pair = (texts[0], texts[1])
        if pair[0] == pair[1]:
            file.add(Answer(prompt_id, pair, "same"))
            continue
        _show_pair(console, f"{number} of {len(prompts)}", prompt_text(prompt), pair)
        answer = _ask(question)
        if answer == "quit":
            return False
        file.add(Answer(prompt_id, pair, answer))
    return True


def _text(result: steer_client.ABResult, name: str) -> str:
    generation = result.normal if name == NORMAL else result.steered[name].generation
    if generation.finish_reason is steer_client.FinishReason.CANCELLED:
        print("steer: the server stopped before the text was finished", file=sys.stderr)
        raise typer.Exit(1)
    return generation.text


def _show_pair(console: Console, place: str, prompt: str, texts: tuple[str, str]) -> None:
    # Both panels have the height of the taller text, no colour, and nothing of how the text came about.
    grid = Table.grid(expand=True, padding=0)
    bodies = [Text(escape_controls(text)) for text in texts]
    panels = [Panel(body, title=str(side), title_align="left") for side, body in enumerate(bodies, 1)]
    fits = console.width >= _MIN_WIDTH
    for _ in range(2 if fits else 1):
        grid.add_column(ratio=1)
    if fits:
        lines = [len(body.wrap(console, max(console.width // 2 - 4, 1))) for body in bodies]
        for panel in panels:
            panel.height = max(lines) + 2
        grid.add_row(*panels)
    else:
        for panel in panels:
            grid.add_row(panel)
    console.print(Text(f"{place}: {escape_controls(prompt)}"))
    console.print(grid)


def _ask(question: str) -> str:
    while True:
        print(f"{question} [1, 2, tie, skip, quit] ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return "quit"
        answer = _ANSWERS.get(line.strip().lower())
        if answer is not None:
            return answer
        print(f"cannot read {line.strip()!r}: answer 1, 2, tie, skip or quit", file=sys.stderr)


def _report(file: VoteFile, total: int, *, as_json: bool) -> None:
    if file.result is None:
        if as_json:
            json_output.print_json({"finished": False, "answered": len(file.answers), "prompts": total})
        else:
            print(f"{len(file.answers)} of {total} prompts are answered and kept: the same command goes on")
    elif as_json:
        json_output.print_json({"finished": True, **file.result})
    else:
        for line in tally_lines(file.result):
            print(escape_controls(line))


def _read_prompts(path: Path) -> Mapping[str, steer_client.Prompt]:
    # Imported here because it imports gRPC, and the commands' help does without.
    from steer_client._sweep.plan import read_prompts

    try:
        prompts = read_prompts(path)
    except steer_client.InvalidRequestError as error:
        raise typer.BadParameter(error.message, param_hint="'--prompts'") from None
    if not prompts:
        raise typer.BadParameter(f"{path} has no prompt", param_hint="'--prompts'")
    return prompts


def _plan(
    client: steer_client.SteerClient,
    prompts: Mapping[str, steer_client.Prompt],
    arms: Arms,
    params: steer_client.SamplingParams,
    question: str,
) -> str:
    """A digest of what is voted on, the model's and the operators' versions too."""
    from steer_client._sweep.plan import digest, prompt_json

    operators = sorted({use.name for uses in arms.values() for use in uses})
    described: dict[str, Any] = {
        "prompts": {name: prompt_json(prompt) for name, prompt in prompts.items()},
        "arms": [[name, repr(uses)] for name, uses in arms.items()],
        "sampling": repr(params),
        "question": question,
        "model": client.model_info().model_fingerprint,
        "operators": {name: client.operator(name).digest for name in operators},
    }
    return digest(described)
