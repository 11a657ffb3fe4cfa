"""The subcommands. None needs gRPC before it is run: `steer_client` imports it with the first name that is used."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import steer_client
from steer_client._cli import experiment_options as x
from steer_client._cli import json_output, model_table, operator_details, operator_table, show_streams
from steer_client._cli import options as o
from steer_client._cli.admin_commands import admin
from steer_client._cli.connection import connect
from steer_client._cli.connection_options import ConnectionOptions
from steer_client._cli.option_groups import expand_groups
from steer_client._cli.score_command import score
from steer_client._cli.sweep_command import sweep
from steer_client._cli.vote_command import vote

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(is_requested: bool) -> None:
    if is_requested:
        # Imported here because it is slow to import, and help does without.
        from importlib.metadata import version as package_version

        print(f"steer {package_version('steering-operators')}")
        raise typer.Exit


@app.callback()
def steer(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Generate text with steering operators, and hold it against the plain text."""


@app.command()
@expand_groups
def generate(
    prompt: o.PromptArgument,
    *,
    steering: o.SteeringOptions,
    sampling: o.SamplingOptions,
    chat: o.ChatOptions,
    connection: ConnectionOptions,
    as_json: o.JsonOption = False,
) -> None:
    """Decode PROMPT, steered by the operators and words given. The text goes to stdout, a summary to stderr.

    steer generate "I went to see the" --operator ocean=0.4 --max-tokens 24
    """
    uses = steering.uses()
    with (
        connect(connection, as_json=as_json) as client,
        client.stream(chat.prompt(prompt), operators=uses, sampling=sampling.params()) as stream,
    ):
        if as_json:
            result = show_streams.read_to_end(stream)
            json_output.print_json(json_output.generation(result, logprobs=sampling.logprobs is not None))
        else:
            show_streams.show_generation(stream)
        _exit_if_cut(stream.result)


@app.command()
@expand_groups
def ab(
    prompt: o.PromptArgument,
    *,
    steering: o.SteeringOptions,
    arm: x.ArmOption = None,
    n: x.SamplesOption = 1,
    mark: x.MarkOption = None,
    no_score: o.NoScoreOption = False,
    sampling: o.SamplingOptions,
    chat: o.ChatOptions,
    connection: ConnectionOptions,
    as_json: o.JsonOption = False,
    as_lines: x.JsonLinesOption = False,
) -> None:
    """Decode PROMPT plain and steered, side by side: words that differ are bold, those of the concept underlined.

    steer ab "I went to see the" --arm "mild: ocean=0.2" --arm "strong: ocean=0.5 tea=0.2"
    """
    arms = x.all_arms(steering, arm)
    if not arms:
        raise typer.BadParameter("name at least one operator, or a word, or an --arm", param_hint="'--operator'")
    if as_json and as_lines:
        raise typer.BadParameter("--json prints one object, --jsonl one for each text", param_hint="'--jsonl'")
    with (
        connect(connection, as_json=as_json, as_lines=as_lines) as client,
        client.compare_stream(
            chat.prompt(prompt), arms=arms, sampling=sampling.params(), score=not no_score, n=n
        ) as stream,
    ):
        if as_json or as_lines:
            result = show_streams.read_to_end(stream)
            json_output.print_comparison(
                result, logprobs=sampling.logprobs is not None, lines=as_lines, one=len(arms) == 1 and n == 1
            )
        else:
            show_streams.show_comparison(
                stream, tuple(arms), scored=not no_score, n=n, marked=x.marked_words(mark, arms)
            )
        _exit_if_cut(*(text for sample in stream.result.samples for text in _generations(sample)))


app.add_typer(admin, name="admin")
app.command()(expand_groups(score))
app.command()(expand_groups(sweep))
app.command()(expand_groups(vote))


@app.command()
@expand_groups
def operators(
    name: o.NameArgument = None,
    reload: o.ReloadOption = False,
    *,
    connection: ConnectionOptions,
    as_json: o.JsonOption = False,
) -> None:
    """List the operators in the server's store, or show all about one.

    steer operators ocean
    """
    with connect(connection, as_json=as_json) as client:
        report = client.reload_operators() if reload else None
        infos = client.operators() if name is None else (client.operator(name),)
        if as_json:
            json_output.print_json({"operators": infos} | ({} if report is None else {"reload": report}))
            return
        if report is not None:
            print(f"reloaded: {operator_table.reload_line(report)}", file=sys.stderr)
        if name is None:
            operator_table.show_operators(infos)
        else:
            operator_details.show_operator(infos[0])


@app.command()
@expand_groups
def info(*, connection: ConnectionOptions, as_json: o.JsonOption = False) -> None:
    """Describe the model, its limits and the engine that serves it.

    steer info --json
    """
    with connect(connection, as_json=as_json) as client:
        model = client.model_info()
        if as_json:
            json_output.print_json(json_output.fields(model))
        else:
            model_table.show_model(model)


@app.command()
@expand_groups
def health(*, connection: ConnectionOptions) -> None:
    """Ask whether the server takes requests: exit status 0 if it does; 1 if not, which says why, or if nobody answers.

    steer health --target 127.0.0.1:50051
    """
    with connect(connection, as_json=False) as client:
        serving = client.health()
        print("serving" if serving else f"not serving{_why_not(client)}")
        if not serving:
            raise typer.Exit(1)


def _why_not(client: steer_client.SteerClient) -> str:
    try:
        if not client.health(probe="live"):
            return ": its engine can decode nothing any more"
        return ": it is stopping" if client.health(probe="started") else ": it is loading its model"
    except steer_client.SteerError:
        # A server of another kind has no such probes, and one that stops may be gone.
        return ""


@app.command()
@expand_groups
def tokenize(
    prompt: o.PromptArgument,
    *,
    chat: o.ChatOptions,
    connection: ConnectionOptions,
    as_json: o.JsonOption = False,
) -> None:
    """Show how PROMPT reaches the model, as tokens.

    steer tokenize "I went to see the" --json
    """
    with connect(connection, as_json=as_json) as client:
        tokens = client.tokenize(chat.prompt(prompt))
        if as_json:
            json_output.print_json(json_output.fields(tokens))
            return
        for token_id, token in zip(tokens.token_ids, tokens.tokens, strict=True):
            print(f"{token_id:>8}  {token!r}")


def _exit_if_cut(*texts: steer_client.Generation) -> None:
    """A text that the server's stop cut short is no success, whatever of it has been shown."""
    if any(text.finish_reason is steer_client.FinishReason.CANCELLED for text in texts):
        print("steer: the server stopped before the text was finished", file=sys.stderr)
        raise typer.Exit(1)


def _generations(result: steer_client.ABResult) -> tuple[steer_client.Generation, ...]:
    return (result.normal, *(arm.generation for arm in result.steered.values()))
