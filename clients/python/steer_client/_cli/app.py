"""The command's subcommands."""

from __future__ import annotations

import sys
from importlib.metadata import version as package_version
from typing import Annotated

import typer

from steer_client._calls import DEFAULT_TARGET, DEFAULT_TIMEOUT, STEERED
from steer_client._cli import details, output, show, tables
from steer_client._cli import options as o
from steer_client._sync import SteerClient

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
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
def generate(
    prompt: o.PromptArgument,
    operator: o.OperatorOption = None,
    rule: o.RuleOption = None,
    max_tokens: o.MaxTokensOption = None,
    temperature: o.TemperatureOption = None,
    top_p: o.TopPOption = None,
    top_k: o.TopKOption = None,
    min_p: o.MinPOption = None,
    repetition_penalty: o.PenaltyOption = None,
    seed: o.SeedOption = None,
    stop: o.StopOption = None,
    ignore_eos: o.IgnoreEosOption = False,
    logprobs: o.LogprobsOption = None,
    time_limit: o.TimeLimitOption = None,
    chat: o.ChatOption = False,
    target: o.TargetOption = DEFAULT_TARGET,
    timeout: o.TimeoutOption = DEFAULT_TIMEOUT,
    as_json: o.JsonOption = False,
) -> None:
    """Decode PROMPT, steered by the operators given. The text goes to stdout, a summary to stderr."""
    uses = o.operator_uses(operator, rule)
    sampling = o.sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        time_limit=time_limit,
    )
    with (
        output.reported(as_json=as_json),
        SteerClient(target, timeout=timeout) as client,
        client.stream(o.prompt(prompt, chat=chat), operators=uses, sampling=sampling) as stream,
    ):
        if as_json:
            output.print_json(output.generation(show.drain(stream), logprobs=logprobs is not None))
        else:
            show.text(stream)


@app.command()
def ab(
    prompt: o.PromptArgument,
    operator: o.OperatorOption = None,
    rule: o.RuleOption = None,
    no_score: o.NoScoreOption = False,
    max_tokens: o.MaxTokensOption = None,
    temperature: o.TemperatureOption = None,
    top_p: o.TopPOption = None,
    top_k: o.TopKOption = None,
    min_p: o.MinPOption = None,
    repetition_penalty: o.PenaltyOption = None,
    seed: o.SeedOption = None,
    stop: o.StopOption = None,
    ignore_eos: o.IgnoreEosOption = False,
    logprobs: o.LogprobsOption = None,
    time_limit: o.TimeLimitOption = None,
    chat: o.ChatOption = False,
    target: o.TargetOption = DEFAULT_TARGET,
    timeout: o.TimeoutOption = DEFAULT_TIMEOUT,
    as_json: o.JsonOption = False,
) -> None:
    """Decode PROMPT plain and steered, side by side. The operators together make the steered text."""
    uses = o.operator_uses(operator, rule)
    if not uses:
        raise typer.BadParameter("name at least one operator", param_hint="'--operator'")
    sampling = o.sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        time_limit=time_limit,
    )
    with (
        output.reported(as_json=as_json),
        SteerClient(target, timeout=timeout) as client,
        client.compare_stream(
            o.prompt(prompt, chat=chat), operators=uses, sampling=sampling, score=not no_score
        ) as stream,
    ):
        if as_json:
            result = show.drain(stream)
            output.print_json(output.comparison(result, STEERED, logprobs=logprobs is not None))
        else:
            show.columns(stream, scored=not no_score)


@app.command()
def operators(
    name: o.NameArgument = None,
    reload: o.ReloadOption = False,
    target: o.TargetOption = DEFAULT_TARGET,
    timeout: o.TimeoutOption = DEFAULT_TIMEOUT,
    as_json: o.JsonOption = False,
) -> None:
    """List the operators in the server's store, or show all about one."""
    with output.reported(as_json=as_json), SteerClient(target, timeout=timeout) as client:
        report = client.reload_operators() if reload else None
        infos = client.operators() if name is None else (client.operator(name),)
        if as_json:
            output.print_json({"operators": infos} | ({} if report is None else {"reload": report}))
            return
        if report is not None:
            print(f"reloaded: {tables.reload(report)}", file=sys.stderr)
        if name is None:
            tables.show_operators(infos)
        else:
            details.show_operator(infos[0])


@app.command()
def info(
    target: o.TargetOption = DEFAULT_TARGET,
    timeout: o.TimeoutOption = DEFAULT_TIMEOUT,
    as_json: o.JsonOption = False,
) -> None:
    """Describe the model, its limits and the engine that serves it."""
    with output.reported(as_json=as_json), SteerClient(target, timeout=timeout) as client:
        model = client.model_info()
        if as_json:
            output.print_json(output.fields(model))
        else:
            tables.show_model(model)


@app.command()
def health(target: o.TargetOption = DEFAULT_TARGET, timeout: o.TimeoutOption = DEFAULT_TIMEOUT) -> None:
    """Ask whether the server takes requests: exit status 0 if it does, 1 if not."""
    with output.reported(as_json=False), SteerClient(target, timeout=timeout) as client:
        serving = client.health()
        print("serving" if serving else "not serving")
        if not serving:
            raise typer.Exit(1)


@app.command()
def tokenize(
    prompt: o.PromptArgument,
    chat: o.ChatOption = False,
    target: o.TargetOption = DEFAULT_TARGET,
    timeout: o.TimeoutOption = DEFAULT_TIMEOUT,
    as_json: o.JsonOption = False,
) -> None:
    """Show how PROMPT reaches the model, as tokens."""
    with output.reported(as_json=as_json), SteerClient(target, timeout=timeout) as client:
        tokens = client.tokenize(o.prompt(prompt, chat=chat))
        if as_json:
            output.print_json(output.fields(tokens))
            return
        for token_id, token in zip(tokens.token_ids, tokens.tokens, strict=True):
            print(f"{token_id:>8}  {token!r}")
