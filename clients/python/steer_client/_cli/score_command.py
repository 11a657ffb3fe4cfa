"""`steer score`: a text read under the plain model and under arms."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from steer_client._cli import experiment_options as x
from steer_client._cli import json_output, score_view
from steer_client._cli import options as o
from steer_client._cli.connection import connect
from steer_client._cli.connection_options import ConnectionOptions
from steer_client._cli.marked_text import read_words

TextArgument = Annotated[
    str | None, typer.Argument(metavar="[TEXT]", help="The text, with the space that it begins with.")
]
FileOption = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="Read the text from a file as it is; - is stdin.")
]
PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", metavar="PROMPT", help="What the text follows. Default: its own first token."),
]
WordsOption = Annotated[
    str | None,
    typer.Option("--words", metavar="WORD,WORD", help="Show the probability that the text goes on with each."),
]
TopOption = Annotated[
    int,
    typer.Option("--top", metavar="K", help="Show which tokens enter and leave the K likeliest, 1 to 20."),
]
DosesOption = Annotated[bool, typer.Option("--doses", help="Show how far each position was pushed.")]
TimeLimitOption = Annotated[
    float | None, typer.Option("--time-limit", metavar="SECONDS", help="Fail after so long on the server.")
]


def score(
    text: TextArgument = None,
    file: FileOption = None,
    prompt: PromptOption = None,
    *,
    steering: o.SteeringOptions,
    arm: x.ArmOption = None,
    words: WordsOption = None,
    top: TopOption = 0,
    doses: DosesOption = False,
    time_limit: TimeLimitOption = None,
    chat: o.ChatOptions,
    connection: ConnectionOptions,
    as_json: o.JsonOption = False,
) -> None:
    """Read TEXT under the plain model and steered, without decoding: log-probabilities, KL and perplexities.

    steer score " ocean was calm" --prompt "I went to see the" --operator ocean --words sea,wave --top 5
    """
    arms = x.all_arms(steering, arm)
    if (text is None) == (file is None):
        raise typer.BadParameter("give the text, or --file with it", param_hint="'TEXT'")
    if chat.chat and prompt is None:
        raise typer.BadParameter("there is no --prompt that could be a user's message", param_hint="'--chat'")
    read = _read_file(file) if text is None and file is not None else text or ""
    with connect(connection, as_json=as_json) as client:
        result = client.score(
            read,
            prompt=None if prompt is None else chat.prompt(prompt),
            arms=arms or None,
            words=read_words(words),
            top=top,
            doses=doses,
            time_limit=time_limit,
        )
        if as_json:
            json_output.print_json(json_output.fields(result))
        else:
            score_view.show_score(result)


def _read_file(path: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {str(path)!r} as UTF-8 text: {error}", param_hint="'--file'") from None
